//! What the engine has to tell a client, until the client's connection takes it: a ring of bytes of fixed size.
//!
//! The engine's thread puts events in and never waits nor allocates: a full outbox says so, and the request pauses. An
//! event is stored as `postcard` writes it. The connection's task on the front's thread takes them out.

use std::borrow::Cow;
use std::sync::Mutex;

use tokio::sync::Notify;

use super::lock;
use super::message::{Answer, Nothing};
use crate::engine::request::Event;
use crate::engine::scheduler::Flow;

/// Room that is counted for an event: a usual token's takes less.
const EVENT_BYTES: usize = 128;
/// The largest event. Texts beyond it are cut in two (of a token) or shortened (of an error).
const EVENT_BYTES_MAX: usize = 1024;
/// What an event takes beside its texts, at most.
const AROUND_BYTES: usize = 64;
/// Bytes before each event in the ring: its length and its request.
const HEADER_BYTES: usize = 2 + 4;
/// The length of what is no event, but says that a command is done.
const OK: u16 = 0;

/// A client's outbox.
#[derive(Debug)]
pub struct Outbox {
    ring: Mutex<Ring>,
    filled: Notify,
}

#[derive(Debug)]
struct Ring {
    bytes: Box<[u8]>,
    /// Where the oldest event is, and how many bytes are taken from there on.
    at: usize,
    len: usize,
    /// The engine found no room, and waits to be told of some.
    refused: bool,
    /// The client is gone.
    closed: bool,
}

/// An event taken out of an outbox.
#[derive(Debug)]
pub struct Taken {
    /// The request it belongs to.
    pub request: u32,
    bytes: heapless::Vec<u8, EVENT_BYTES_MAX>,
}

impl Taken {
    /// What there is to say.
    pub fn answer(&self) -> Answer<'_> {
        if self.bytes.is_empty() {
            return Answer::Ok(Nothing {});
        }
        Answer::Event(postcard::from_bytes(&self.bytes).expect("what `put` wrote"))
    }
}

impl Outbox {
    /// An outbox for about `events` events.
    pub fn new(events: usize) -> Outbox {
        let bytes = (events * EVENT_BYTES).max(4 * EVENT_BYTES_MAX);
        Outbox {
            ring: Mutex::new(Ring {
                bytes: vec![0; bytes].into(),
                at: 0,
                len: 0,
                refused: false,
                closed: false,
            }),
            filled: Notify::new(),
        }
    }

    /// Bytes that an outbox for `events` events takes.
    pub fn bytes(events: usize) -> usize {
        (events * EVENT_BYTES).max(4 * EVENT_BYTES_MAX) + size_of::<Outbox>()
    }

    /// Puts an event in, unless there is no room for it or the client is gone.
    pub fn put(&self, request: u32, event: &Event<'_>) -> Flow {
        self.put_by(|ring| ring.put(request, event))
    }

    /// Says that a command is done.
    pub fn put_ok(&self, request: u32) -> Flow {
        self.put_by(|ring| ring.put_record(&record_header(OK, request)))
    }

    fn put_by(&self, put: impl FnOnce(&mut Ring) -> bool) -> Flow {
        let mut ring = lock(&self.ring);
        if ring.closed {
            return Flow::Gone;
        }
        if !put(&mut ring) {
            ring.refused = true;
            return Flow::Full;
        }
        drop(ring);
        self.filled.notify_one();
        Flow::Taken
    }

    /// The oldest event, and whether the engine waits for the room that it leaves.
    pub fn take(&self) -> Option<(Taken, bool)> {
        let mut ring = lock(&self.ring);
        let taken = ring.take()?;
        // Half of it, so that a slow client does not wake the engine for every event.
        let wake = ring.refused && ring.len <= ring.bytes.len() / 2;
        ring.refused &= !wake;
        Some((taken, wake))
    }

    /// Waits until something may have been put in.
    pub async fn filled(&self) {
        self.filled.notified().await;
    }

    /// The client is gone.
    pub fn close(&self) {
        let mut ring = lock(&self.ring);
        ring.closed = true;
        ring.len = 0;
    }
}

impl Ring {
    fn put(&mut self, request: u32, event: &Event<'_>) -> bool {
        match event {
            Event::Token { index, id, text } if text.len() > EVENT_BYTES_MAX - AROUND_BYTES => {
                let pieces = text.len().div_ceil(EVENT_BYTES_MAX - AROUND_BYTES - 3);
                if pieces * (HEADER_BYTES + EVENT_BYTES_MAX) > self.bytes.len() - self.len {
                    return false;
                }
                let mut rest = text.as_ref();
                while !rest.is_empty() {
                    let piece = shortened(rest, EVENT_BYTES_MAX - AROUND_BYTES);
                    rest = &rest[piece.len()..];
                    let text = Cow::Borrowed(piece);
                    self.put_one(
                        request,
                        &Event::Token {
                            index: *index,
                            id: *id,
                            text,
                        },
                    );
                }
                true
            }
            Event::Error { code, text, remedy } => {
                let room = (EVENT_BYTES_MAX - AROUND_BYTES) / 2;
                let (text, remedy) = (shortened(text, room).into(), shortened(remedy, room).into());
                self.put_one(
                    request,
                    &Event::Error {
                        code: *code,
                        text,
                        remedy,
                    },
                )
            }
            event => self.put_one(request, event),
        }
    }

    fn put_one(&mut self, request: u32, event: &Event<'_>) -> bool {
        let mut buffer = [0; HEADER_BYTES + EVENT_BYTES_MAX];
        let (header, body) = buffer.split_at_mut(HEADER_BYTES);
        let written = postcard::to_slice(event, body).map_or(0, |bytes| bytes.len());
        debug_assert!(written > 0, "larger than any event: {event:?}");
        header.copy_from_slice(&record_header(written as u16, request));
        self.put_record(&buffer[..HEADER_BYTES + written])
    }

    fn put_record(&mut self, record: &[u8]) -> bool {
        if record.len() > self.bytes.len() - self.len {
            return false;
        }
        let end = (self.at + self.len) % self.bytes.len();
        let (first, second) = record.split_at(record.len().min(self.bytes.len() - end));
        self.bytes[end..end + first.len()].copy_from_slice(first);
        self.bytes[..second.len()].copy_from_slice(second);
        self.len += record.len();
        true
    }

    fn take(&mut self) -> Option<Taken> {
        if self.len == 0 {
            return None;
        }
        let mut header = [0; HEADER_BYTES];
        self.copy_out(&mut header);
        let [len0, len1, request @ ..] = header;
        let mut bytes = heapless::Vec::new();
        let len = usize::from(u16::from_le_bytes([len0, len1]));
        bytes.resize_default(len).expect("no larger was put in");
        self.copy_out(&mut bytes);
        Some(Taken {
            request: u32::from_le_bytes(request),
            bytes,
        })
    }

    fn copy_out(&mut self, out: &mut [u8]) {
        let straight = out.len().min(self.bytes.len() - self.at);
        let (first, second) = out.split_at_mut(straight);
        first.copy_from_slice(&self.bytes[self.at..self.at + straight]);
        second.copy_from_slice(&self.bytes[..second.len()]);
        self.at = (self.at + out.len()) % self.bytes.len();
        self.len -= out.len();
    }
}

fn record_header(len: u16, request: u32) -> [u8; HEADER_BYTES] {
    let ([a, b], [c, d, e, f]) = (len.to_le_bytes(), request.to_le_bytes());
    [a, b, c, d, e, f]
}

/// The start of a text that has at most so many bytes.
pub(super) fn shortened(text: &str, bytes_max: usize) -> &str {
    let mut end = bytes_max.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::request::{Counts, Reason, Timings};
    use crate::error::Kind;

    fn token(index: u32, text: &str) -> Event<'_> {
        Event::Token {
            index,
            id: 7,
            text: text.into(),
        }
    }

    #[test]
    fn events_come_out_as_they_went_in_through_every_wrap() {
        let outbox = Outbox::new(1);
        let (mut put, mut taken) = (0, 0);
        while taken < 2_000 {
            while outbox.put(
                put % 3,
                &token(put, &"ab\u{1f980}"[..2 + 4 * (put % 2) as usize]),
            ) == Flow::Taken
            {
                put += 1;
            }
            assert!(put > taken + 10, "no room though it is empty");
            let mut woke = false;
            while let Some((out, wake)) = outbox.take() {
                let text = &"ab\u{1f980}"[..2 + 4 * (taken % 2) as usize];
                assert_eq!(
                    (out.request, out.answer()),
                    (taken % 3, Answer::Event(token(taken, text)))
                );
                woke |= wake;
                taken += 1;
            }
            assert!(woke, "the engine was refused and never woken");
        }
    }

    #[test]
    fn long_texts_are_cut_and_never_lost() {
        let outbox = Outbox::new(64);
        let long = "\u{1f980}".repeat(600);
        assert_eq!(outbox.put(1, &token(0, &long)), Flow::Taken);
        let error = Event::Error {
            code: Kind::Io,
            text: (&long).into(),
            remedy: "wait".into(),
        };
        assert_eq!(outbox.put(1, &error), Flow::Taken);
        assert_eq!(outbox.put_ok(1), Flow::Taken);
        let (mut text, mut ok) = (String::new(), 0);
        while let Some((out, _)) = outbox.take() {
            match out.answer() {
                Answer::Event(Event::Token {
                    index: 0,
                    id: 7,
                    text: piece,
                }) => text.push_str(&piece),
                Answer::Event(Event::Error {
                    text: short,
                    remedy,
                    ..
                }) => {
                    assert!(long.starts_with(short.as_ref()) && short.len() > 400);
                    assert_eq!(remedy, "wait");
                }
                Answer::Ok(_) => ok += 1,
                other => panic!("{other:?}"),
            }
        }
        assert_eq!((text, ok), (long, 1));
    }

    #[test]
    fn a_closed_outbox_says_so_and_holds_nothing() {
        let outbox = Outbox::new(4);
        outbox.close();
        let done = Event::Done {
            reason: Reason::Cancelled,
            counts: Counts::default(),
            timings: Timings::default(),
        };
        for _ in 0..10_000 {
            assert_eq!(outbox.put(0, &done), Flow::Gone);
        }
        assert!(outbox.take().is_none());
    }
}
