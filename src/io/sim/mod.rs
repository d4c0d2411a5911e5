//! Simulated reads for tests: seeded faults and delays, and a disk on a virtual clock.
//!
//! Integration tests need it, so it is an ordinary module; nothing but tests
//! uses it. Time, randomness and contents are arguments: one seed gives one run.
//!
//! Until a read completes its target holds [`POISON`], so that whoever looks
//! too early computes nonsense and not, by luck, the right thing.
#![allow(unsafe_code)]

mod disk;
mod random;

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;

use crate::error::Result;

use super::{Completion, FileId, Full, Io, Read};
use disk::Queue;
use random::Random;

pub use disk::{Clock, Disk, Jitter};

/// What the target of a read holds until the read completes.
pub const POISON: u8 = 0xA5;

/// Direct reads are short by whole sectors.
const SECTOR: u32 = 512;

/// Writes the bytes of a file from an offset on, and says how many there are.
pub type ServeFn = Box<dyn FnMut(FileId, u64, &mut [u8]) -> usize + Send>;

/// Where the bytes come from.
pub enum Content {
    /// The files' bytes, `FileId(0)` first.
    Bytes(Vec<Arc<[u8]>>),
    /// A function.
    Serve(ServeFn),
    /// Nowhere: reads succeed in full and memory is left alone, for simulations of time only.
    Nothing,
}

/// When reads finish.
pub enum Timing {
    /// In random order, each after up to this many further calls of `reap`.
    Reaps(u32),
    /// As on this disk, by this clock. A `reap` that waits moves the clock on to the next completion.
    Disk(Disk, Clock),
}

/// What can go wrong with a read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// Fewer bytes than asked for, by whole sectors.
    Short,
    /// EINTR.
    Interrupted,
    /// EAGAIN.
    Again,
    /// EIO, with the target in an unknown state.
    Io,
    /// Success, with one bit wrong.
    Flip,
}

/// A fault for reads of a certain range.
#[derive(Clone, Debug)]
pub struct FaultAt {
    /// The file.
    pub file: FileId,
    /// Reads that touch these bytes are hit.
    pub range: Range<u64>,
    /// What happens to them.
    pub fault: Fault,
    /// To how many of them; `u32::MAX` for all.
    pub times: u32,
}

/// How often reads go wrong, and where. The default is never.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// Chance of each kind for any read, 0 to 1; their sum is at most 1.
    pub rates: Vec<(Fault, f64)>,
    /// Certain faults, looked at first.
    pub at: Vec<FaultAt>,
}

/// What the simulation is to do.
pub struct Options {
    /// Decides order, delays and faults.
    pub seed: u64,
    /// Reads in flight at most.
    pub depth: usize,
    /// Where the bytes come from.
    pub content: Content,
    /// When reads finish.
    pub timing: Timing,
    /// What goes wrong.
    pub faults: Faults,
    /// Finished reads that [`Log::reads`] remembers; memory for them is taken at the start.
    pub log_reads_max: usize,
}

/// A finished read, as the simulation saw it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Logged {
    /// The file.
    pub file: FileId,
    /// First byte.
    pub offset: u64,
    /// Bytes asked for.
    pub len: u32,
    /// The caller's token.
    pub token: u64,
    /// What was done to it.
    pub fault: Option<Fault>,
    /// What the caller was told.
    pub result: std::result::Result<u32, Errno>,
    /// When it was handed over and when it finished: calls of `reap`, or nanoseconds of the clock.
    pub span: (u64, u64),
}

/// What was read so far.
#[derive(Debug, Default)]
pub struct Log {
    /// The first finished reads, in order, up to [`Options::log_reads_max`].
    pub reads: Vec<Logged>,
    /// Finished reads, remembered or not.
    pub read_count: u64,
    /// Bytes delivered.
    pub bytes: u64,
    /// Finished reads with a fault.
    pub fault_count: u64,
    /// Time that calls of `reap` waited for, by the disk's clock.
    pub stalled_ns: u64,
}

/// The simulation.
pub struct Sim {
    random: Random,
    depth: usize,
    content: Content,
    faults: Faults,
    log: Arc<Mutex<Log>>,
    log_reads_max: usize,
    unsent: Vec<Read>,
    sent: Vec<Sent>,
    /// Calls of `reap` so far.
    reaps: u64,
    pace: Pace,
    description: String,
}

/// [`Timing`] with its state.
enum Pace {
    Reaps(u32),
    Disk(Queue, Clock),
}

#[derive(Clone, Copy)]
struct Sent {
    read: Read,
    fault: Option<Fault>,
    at: u64,
    done: u64,
}

impl Sim {
    /// Starts a simulation.
    pub fn new(options: Options) -> Self {
        let Options {
            seed,
            depth,
            content,
            timing,
            faults,
            log_reads_max,
        } = options;
        let pace = match timing {
            Timing::Reaps(delay_max) => Pace::Reaps(delay_max),
            Timing::Disk(disk, clock) => Pace::Disk(Queue::new(disk), clock),
        };
        let reads = Vec::with_capacity(log_reads_max);
        Sim {
            random: Random(seed),
            depth,
            content,
            faults,
            log: Arc::new(Mutex::new(Log {
                reads,
                ..Log::default()
            })),
            log_reads_max,
            unsent: Vec::with_capacity(depth),
            sent: Vec::with_capacity(depth),
            reaps: 0,
            pace,
            description: format!("simulation with seed {seed}"),
        }
    }

    /// What was read so far, to look at while the simulation runs elsewhere.
    pub fn log(&self) -> Arc<Mutex<Log>> {
        self.log.clone()
    }

    fn now(&self) -> u64 {
        match &self.pace {
            Pace::Reaps(_) => self.reaps,
            Pace::Disk(_, clock) => clock.now_ns(),
        }
    }

    /// Decides when a read that is handed over now will be done.
    fn schedule(&mut self, len: u32) -> u64 {
        let now = self.now();
        match &mut self.pace {
            Pace::Reaps(delay_max) => now + 1 + self.random.below(u64::from(*delay_max) + 1),
            Pace::Disk(queue, _) => queue.take(len, now, &mut self.random),
        }
    }

    fn choose_fault(&mut self, read: &Read) -> Option<Fault> {
        let end = read.offset + u64::from(read.len);
        let hit = self.faults.at.iter_mut().find(|at| {
            at.times > 0
                && at.file == read.file
                && at.range.start < end
                && read.offset < at.range.end
        });
        if let Some(at) = hit {
            at.times = if at.times == u32::MAX {
                u32::MAX
            } else {
                at.times - 1
            };
            return Some(at.fault);
        }
        let mut roll = self.random.unit();
        for &(fault, rate) in &self.faults.rates {
            if roll < rate {
                return Some(fault);
            }
            roll -= rate;
        }
        None
    }

    /// The finished read to report next: any of those that are done by calls, the first by the clock.
    fn pick(&mut self) -> Option<usize> {
        let now = self.now();
        match &self.pace {
            Pace::Reaps(_) => {
                let count = self.sent.iter().filter(|sent| sent.done <= now).count() as u64;
                let nth = if count == 0 {
                    return None;
                } else {
                    self.random.below(count) as usize
                };
                let mut done = self
                    .sent
                    .iter()
                    .enumerate()
                    .filter(|(_, sent)| sent.done <= now);
                done.nth(nth).map(|(i, _)| i)
            }
            Pace::Disk(..) => {
                let done = self
                    .sent
                    .iter()
                    .enumerate()
                    .filter(|(_, sent)| sent.done <= now);
                done.min_by_key(|(_, sent)| sent.done).map(|(i, _)| i)
            }
        }
    }

    /// Does the read, faults and all.
    fn perform(&mut self, sent: &Sent) -> std::result::Result<u32, Errno> {
        let Read {
            file,
            offset,
            len,
            into,
            ..
        } = sent.read;
        match sent.fault {
            Some(Fault::Interrupted) => return Err(Errno::EINTR),
            Some(Fault::Again) => return Err(Errno::EAGAIN),
            Some(Fault::Io) => return Err(Errno::EIO),
            Some(Fault::Short | Fault::Flip) | None => {}
        }
        let wanted = match sent.fault {
            Some(Fault::Short) if len >= 2 * SECTOR => {
                SECTOR * (1 + self.random.below(u64::from(len / SECTOR) - 1) as u32)
            }
            _ => len,
        };
        if let Content::Nothing = self.content {
            return Ok(wanted);
        }
        // SAFETY: whoever submitted the read vouched for `len` bytes until it is reaped, which it
        // is not yet; `submit` filled them with poison, so they are initialised.
        let target = unsafe { std::slice::from_raw_parts_mut(into.as_ptr(), wanted as usize) };
        let got = match &mut self.content {
            Content::Bytes(files) => {
                let bytes = files
                    .get(usize::from(file.0))
                    .map_or(&[][..], |bytes| bytes);
                let from = &bytes[bytes
                    .len()
                    .min(usize::try_from(offset).unwrap_or(usize::MAX))..];
                let count = from.len().min(target.len());
                target[..count].copy_from_slice(&from[..count]);
                count
            }
            Content::Serve(serve) => serve(file, offset, target),
            Content::Nothing => 0,
        };
        if sent.fault == Some(Fault::Flip) && got > 0 {
            let bit = self.random.below(8 * got as u64);
            target[(bit / 8) as usize] ^= 1 << (bit % 8);
        }
        Ok(got as u32)
    }

    fn finish(&mut self, i: usize) -> Completion {
        let sent = self.sent.swap_remove(i);
        let result = self.perform(&sent);
        let Read {
            file,
            offset,
            len,
            token,
            ..
        } = sent.read;
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        log.read_count += 1;
        log.bytes += u64::from(result.unwrap_or(0));
        log.fault_count += u64::from(sent.fault.is_some());
        if log.reads.len() < self.log_reads_max {
            let span = (sent.at, sent.done);
            log.reads.push(Logged {
                file,
                offset,
                len,
                token,
                fault: sent.fault,
                result,
                span,
            });
        }
        Completion { token, result }
    }

    /// Lets time pass until a read is done.
    fn wait(&mut self) {
        let Some(next) = self.sent.iter().map(|sent| sent.done).min() else {
            return;
        };
        let stalled = next.saturating_sub(self.now());
        match &self.pace {
            Pace::Reaps(_) => self.reaps = self.reaps.max(next),
            Pace::Disk(_, clock) => {
                clock.advance_to(next);
                self.log
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .stalled_ns += stalled;
            }
        }
    }
}

impl Io for Sim {
    unsafe fn submit(&mut self, read: Read) -> std::result::Result<(), Full> {
        if self.in_flight() == self.depth {
            return Err(Full);
        }
        if !matches!(self.content, Content::Nothing) {
            // SAFETY: the caller vouches for `len` bytes from now on.
            unsafe { read.into.as_ptr().write_bytes(POISON, read.len as usize) };
        }
        self.unsent.push(read);
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        for i in 0..self.unsent.len() {
            let read = self.unsent[i];
            let (fault, at, done) = (
                self.choose_fault(&read),
                self.now(),
                self.schedule(read.len),
            );
            self.sent.push(Sent {
                read,
                fault,
                at,
                done,
            });
        }
        self.unsent.clear();
        if let Pace::Disk(queue, clock) = &self.pace
            && queue.in_lumps()
        {
            let now = clock.now_ns();
            let last = self.sent.iter().map(|sent| sent.done).max().unwrap_or(now);
            let open = self.sent.iter_mut().filter(|sent| sent.done > now);
            open.for_each(|sent| sent.done = last);
        }
        Ok(())
    }

    fn reap(&mut self, done: &mut [Completion], wait: bool) -> Result<usize> {
        self.reaps += 1;
        if wait && !done.is_empty() {
            self.flush()?;
            self.wait();
        }
        let mut count = 0;
        while count < done.len() {
            let Some(i) = self.pick() else { break };
            done[count] = self.finish(i);
            count += 1;
        }
        Ok(count)
    }

    fn depth(&self) -> usize {
        self.depth
    }

    fn in_flight(&self) -> usize {
        self.unsent.len() + self.sent.len()
    }

    fn describe(&self) -> &str {
        &self.description
    }
}

impl Drop for Sim {
    /// Writes what is in flight, as a real disk would, so that memory freed too early is noticed.
    fn drop(&mut self) {
        while !self.sent.is_empty() {
            self.finish(self.sent.len() - 1);
        }
    }
}
