//! A port and the protocol on it, put together: bytes in, bytes out, and the time in between.

use std::io;
use std::time::{Duration, Instant};

use super::frame::Wire;
use super::link::{Event, Link, Timing};
use super::port::Port;

/// Bytes that are read at a time.
const READ_BYTES: usize = 256;

/// One end of a serial line.
#[derive(Debug)]
pub struct Framed {
    port: Port,
    link: Link,
    started: Instant,
    /// Bytes of a frame that the driver has not taken yet.
    out: Wire,
}

impl Framed {
    /// An end that calls, or waits to be called.
    pub fn new(port: Port, baud: u32, calls: bool) -> Framed {
        let clock = std::time::UNIX_EPOCH
            .elapsed()
            .map_or(0, |t| t.as_nanos() as u64);
        let incarnation = (clock ^ clock >> 16 ^ u64::from(std::process::id())) as u16;
        Framed {
            port,
            link: Link::new(incarnation, calls, Timing::of_baud(baud)),
            started: Instant::now(),
            out: Wire::new(),
        }
    }

    /// Goes on with another port: the device was unplugged and has come back. What was under way is repeated.
    pub fn replace_port(&mut self, port: Port) {
        self.port = port;
        self.out.clear();
    }

    /// The protocol, for messages to send.
    pub fn link(&mut self) -> &mut Link {
        &mut self.link
    }

    /// The next thing that happened.
    pub fn event(&mut self) -> Option<Event<'_>> {
        self.link.event()
    }

    /// Waits until bytes were read or written, or the protocol's time has come. May be dropped at any time.
    ///
    /// # Errors
    /// The device is gone.
    pub async fn turn(&mut self) -> io::Result<()> {
        let now_ms = self.now_ms();
        if self.out.is_empty()
            && let Some(wire) = self.link.transmit(now_ms)
        {
            self.out = wire;
        }
        let wake_ms = self.link.deadline_ms().map(|at| at.saturating_sub(now_ms));
        let wake = Duration::from_millis(wake_ms.unwrap_or(0));
        let mut bytes = [0; READ_BYTES];
        tokio::select! {
            read = self.port.read(&mut bytes) => {
                let read = read?;
                let now_ms = self.now_ms();
                for &byte in &bytes[..read] {
                    self.link.feed(byte, now_ms);
                }
            }
            written = self.port.write(&self.out), if !self.out.is_empty() => {
                let rest = &self.out[written?..];
                self.out = heapless::Vec::from_slice(rest).expect("a part of what fitted");
            }
            () = tokio::time::sleep(wake), if self.out.is_empty() && wake_ms.is_some() => {}
        }
        Ok(())
    }

    /// Sends what is due, so that the peer knows what has arrived before this end goes away.
    ///
    /// # Errors
    /// The device is gone.
    pub async fn flush(&mut self) -> io::Result<()> {
        loop {
            while !self.out.is_empty() {
                let written = self.port.write(&self.out).await?;
                self.out =
                    heapless::Vec::from_slice(&self.out[written..]).expect("a part of what fitted");
            }
            match self.link.transmit(self.now_ms()) {
                Some(wire) => self.out = wire,
                None => return Ok(()),
            }
        }
    }

    fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }
}
