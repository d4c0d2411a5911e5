//! A reliable line of messages over a noisy line of bytes: numbered frames, acknowledgement, retransmission.
//!
//! A pure state machine: it owns no port and no clock. Bytes that arrived go in by [`Link::feed`], after which
//! [`Link::event`] tells what they amount to; [`Link::transmit`] says what to send now, and [`Link::deadline_ms`] when
//! to ask again if nothing arrives. Times are milliseconds of any clock that does not go back.
//!
//! Each end has an **incarnation**, a number it draws when it starts. Frames name both ends' incarnations, so that
//! what was meant for an end before its restart is not taken for the present one's. The end that calls begins with a
//! hello until it is answered; the other stays silent until called. After that up to [`WINDOW`] data frames are under
//! way, each repeated until it is acknowledged; what arrives out of order waits for what is missing. A peer that
//! leaves everything unanswered for [`Timing::lost_ms`] is [`Event::Lost`], with all that was under way.

use heapless::{Deque, Vec};

use super::frame::{Frame, Kind, PAYLOAD_MAX, Read, Reader, Wire};

/// The longest message, in bytes.
pub const MESSAGE_MAX: usize = 8192;
/// Data frames under way at a time: as many as a header can acknowledge.
pub const WINDOW: usize = 8;
/// Pieces of messages that wait to be sent or acknowledged: the longest message, and replies behind it.
const QUEUE: usize = MESSAGE_MAX / PAYLOAD_MAX + 64;
/// A caller that was not answered so often takes another number: the other end may have drawn the same, and would take
/// the hellos for an echo of its own.
const HELLOS_MAX: u8 = 4;
/// A repetition that was not answered waits longer each time, up to so many doublings.
const DOUBLINGS_MAX: u8 = 2;

/// How long to wait for what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// For an acknowledgement, before a frame is repeated.
    pub repeat_ms: u64,
    /// For the answer to a hello; and the caller's silence after which it asks whether the peer is still there.
    pub hello_ms: u64,
    /// For any sign of life while something is under way.
    pub lost_ms: u64,
}

impl Timing {
    /// What suits a line of so many bits a second: a window of full frames and its acknowledgements pass twice before
    /// a frame is repeated.
    pub fn of_baud(baud: u32) -> Timing {
        // A byte is ten bits on the line.
        let window_bits = (WINDOW * Wire::new().capacity() * 10) as u64;
        let window_ms = window_bits * 1000 / u64::from(baud.max(1));
        Timing {
            repeat_ms: 2 * window_ms + 40,
            hello_ms: window_ms + 500,
            lost_ms: 40 * window_ms + 10_000,
        }
    }
}

/// What arrived bytes amount to.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// The peer is there, and knows nothing of anything before: it is new, or has restarted.
    Connected,
    /// A whole message.
    Message(&'a [u8]),
    /// A message was longer than [`MESSAGE_MAX`] and is dropped.
    TooLong,
    /// The peer is silent for too long: nothing that was under way will arrive.
    Lost,
}

/// The queue cannot take the message now; it can when acknowledgements have arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Full;

/// What the line did so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Whole frames that arrived.
    pub frames: u64,
    /// Pieces of noise between zeros, and frames that suffered from it.
    pub damaged: u64,
    /// Data frames that were sent once more.
    pub repeated: u64,
}

/// A piece of a message on its way out.
#[derive(Debug)]
struct Piece {
    payload: Vec<u8, PAYLOAD_MAX>,
    last: bool,
    acked: bool,
    /// When it was sent last, and as which frame of all; never, if none.
    sent: Option<(u64, u64)>,
    repeats: u8,
    /// It is known not to have arrived.
    missing: bool,
}

/// A piece that has arrived.
type Arrived = (Vec<u8, PAYLOAD_MAX>, bool);

/// One end of the line.
#[derive(Debug)]
pub struct Link {
    timing: Timing,
    /// This end begins.
    calls: bool,
    own: u16,
    peer: Option<u16>,
    /// The peer knows this end's incarnation.
    known: bool,
    reader: Reader,
    /// Pieces not yet acknowledged, the oldest first; its number is `first`.
    queue: Deque<Piece, QUEUE>,
    first: u8,
    /// Data frames sent so far.
    sent: u64,
    /// The piece that is expected next, and this and those after it as far as they have arrived.
    expected: u8,
    arrived: [Option<Arrived>; WINDOW],
    message: Vec<u8, MESSAGE_MAX>,
    too_long: bool,
    /// The message was handed out; the next begins.
    message_over: bool,
    ack_due: bool,
    hello_due: bool,
    connected_due: bool,
    lost_due: bool,
    hello_sent_ms: Option<u64>,
    /// Hellos since anything was heard, be it noise.
    hellos: u8,
    heard_ms: u64,
    /// Since when something is under way without a sign of life.
    waiting_since_ms: Option<u64>,
    counts: Counts,
}

impl Link {
    /// An end of incarnation `own` (any number but 0, another one at each start). It `calls`, or waits to be called.
    pub fn new(own: u16, calls: bool, timing: Timing) -> Link {
        Link {
            timing,
            calls,
            own: own.max(1),
            peer: None,
            known: false,
            reader: Reader::default(),
            queue: Deque::new(),
            first: 0,
            sent: 0,
            expected: 0,
            arrived: [const { None }; WINDOW],
            message: Vec::new(),
            too_long: false,
            message_over: false,
            ack_due: false,
            hello_due: false,
            connected_due: false,
            lost_due: false,
            hello_sent_ms: None,
            hellos: 0,
            heard_ms: 0,
            waiting_since_ms: None,
            counts: Counts::default(),
        }
    }

    /// What the line did so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Whether all that was sent has arrived.
    pub fn is_idle(&self) -> bool {
        self.queue.is_empty()
    }

    /// Whether [`send`](Self::send) would take a message of so many bytes.
    pub fn has_room(&self, bytes: usize) -> bool {
        bytes.max(1).div_ceil(PAYLOAD_MAX) <= QUEUE - self.queue.len()
    }

    /// Queues a message of at most [`MESSAGE_MAX`] bytes.
    pub fn send(&mut self, message: &[u8]) -> Result<(), Full> {
        if message.len() > MESSAGE_MAX || !self.has_room(message.len()) {
            return Err(Full);
        }
        let mut rest = message;
        loop {
            let (payload, after) = rest.split_at(rest.len().min(PAYLOAD_MAX));
            rest = after;
            let piece = Piece {
                payload: Vec::from_slice(payload).expect("cut to size"),
                last: rest.is_empty(),
                acked: false,
                sent: None,
                repeats: 0,
                missing: false,
            };
            self.queue.push_back(piece).expect("room was checked");
            if rest.is_empty() {
                return Ok(());
            }
        }
    }

    /// Takes a byte that arrived. True at the end of a frame: then see [`event`](Self::event) until it has no more.
    pub fn feed(&mut self, byte: u8, now_ms: u64) -> bool {
        let read = self.reader.push(byte);
        if read.is_some() {
            self.hellos = 0;
        }
        match read {
            None => false,
            Some(Read::Damaged) => {
                self.counts.damaged += 1;
                false
            }
            Some(Read::Frame(frame)) => {
                self.counts.frames += 1;
                self.frame(frame, now_ms);
                true
            }
        }
    }

    fn frame(&mut self, frame: Frame, now_ms: u64) {
        // An end that hears itself has an echo on the line.
        if frame.from == self.own || frame.from == 0 {
            return;
        }
        if frame.kind == Kind::Hello {
            // A hello to nobody comes from a peer that knows nothing of us, even if it drew its old number again.
            let afresh = self.peer != Some(frame.from) || (frame.to == 0 && self.has_history());
            if afresh {
                self.begin(frame.from, now_ms);
            }
            let known = frame.to == self.own;
            self.hello_due |= !known;
            self.ack_due |= known;
            self.heard(known, now_ms);
            return;
        }
        if self.peer != Some(frame.from) || frame.to != self.own {
            self.hello_due = true;
            return;
        }
        self.heard(true, now_ms);
        self.acknowledged(frame.ack, frame.ack_after);
        if let Kind::Data { last } = frame.kind {
            self.ack_due = true;
            let ahead = usize::from(frame.seq.wrapping_sub(self.expected));
            if let Some(place) = self.arrived.get_mut(ahead) {
                *place = Some((frame.payload, last));
            }
        }
    }

    /// Whether anything was exchanged with the present peer.
    fn has_history(&self) -> bool {
        self.known || self.expected != 0 || self.first != 0
    }

    /// Starts over with a peer.
    fn begin(&mut self, peer: u16, now_ms: u64) {
        self.forget();
        self.peer = Some(peer);
        self.heard_ms = now_ms;
        self.connected_due = true;
    }

    fn forget(&mut self) {
        self.peer = None;
        self.known = false;
        self.queue.clear();
        self.first = 0;
        self.expected = 0;
        self.arrived.fill(None);
        self.message.clear();
        self.message_over = false;
        self.too_long = false;
        self.ack_due = false;
        self.waiting_since_ms = None;
        self.hello_sent_ms = None;
    }

    fn heard(&mut self, known: bool, now_ms: u64) {
        self.known |= known;
        self.heard_ms = now_ms;
        self.waiting_since_ms = None;
    }

    /// Drops what the peer has. The line keeps the order, so what was sent before something that has arrived, and has
    /// not arrived itself, is lost.
    fn acknowledged(&mut self, ack: u8, ack_after: u8) {
        let done = usize::from(ack.wrapping_sub(self.first));
        // More than are under way cannot have arrived: a frame from before the queue was cleared.
        if done > self.queue.len().min(WINDOW) {
            return;
        }
        let mut newest = 0;
        for _ in 0..done {
            let piece = self.queue.pop_front().filter(|piece| !piece.acked);
            newest = piece
                .and_then(|p| p.sent)
                .map_or(0, |(_, order)| order)
                .max(newest);
        }
        self.first = ack;
        let arrived = |place: usize| place > 0 && ack_after & 1 << (place - 1) != 0;
        for (place, piece) in self.queue.iter_mut().take(WINDOW).enumerate() {
            if arrived(place) && !piece.acked {
                piece.acked = true;
                newest = piece.sent.map_or(0, |(_, order)| order).max(newest);
            }
        }
        for piece in self.queue.iter_mut().take(WINDOW) {
            piece.missing |= !piece.acked && piece.sent.is_some_and(|(_, order)| order < newest);
        }
    }

    /// The next thing that happened.
    pub fn event(&mut self) -> Option<Event<'_>> {
        if std::mem::take(&mut self.lost_due) {
            return Some(Event::Lost);
        }
        if std::mem::take(&mut self.connected_due) {
            return Some(Event::Connected);
        }
        if std::mem::take(&mut self.message_over) {
            self.message.clear();
        }
        while let Some((payload, last)) = self.arrived[0].take() {
            self.arrived.rotate_left(1);
            self.expected = self.expected.wrapping_add(1);
            self.too_long |= self.message.extend_from_slice(&payload).is_err();
            if last {
                self.message_over = true;
                return Some(if std::mem::take(&mut self.too_long) {
                    Event::TooLong
                } else {
                    Event::Message(&self.message)
                });
            }
        }
        None
    }

    /// The next frame to send now, if any. Ask only when the line can take it, so that times of sending are true.
    pub fn transmit(&mut self, now_ms: u64) -> Option<Wire> {
        self.give_up(now_ms);
        if self.wants_hello(now_ms) {
            self.hello_due = false;
            self.hello_sent_ms = Some(now_ms);
            self.hellos = self.hellos.saturating_add(1);
            if self.hellos > HELLOS_MAX && self.calls && self.peer.is_none() {
                self.hellos = 1;
                // A step of a generator that goes through all numbers.
                self.own = self.own.wrapping_mul(25_173).wrapping_add(13_849).max(1);
            }
            return Some(self.header(Kind::Hello, 0).encode());
        }
        if !self.known {
            return None;
        }
        let timing = self.timing;
        let due = self.queue.iter_mut().take(WINDOW).enumerate();
        let due = { due }.find(|(_, piece)| piece.due_ms(&timing).is_some_and(|due| due <= now_ms));
        if let Some((place, piece)) = due {
            if piece.sent.is_some() {
                piece.repeats = piece.repeats.saturating_add(1);
                self.counts.repeated += 1;
            }
            self.sent += 1;
            piece.sent = Some((now_ms, self.sent));
            piece.missing = false;
            let (last, payload) = (piece.last, piece.payload.clone());
            self.waiting_since_ms.get_or_insert(now_ms);
            self.ack_due = false;
            let mut frame = self.header(Kind::Data { last }, place as u8);
            frame.payload = payload;
            return Some(frame.encode());
        }
        if std::mem::take(&mut self.ack_due) {
            return Some(self.header(Kind::Ack, 0).encode());
        }
        None
    }

    /// When [`transmit`](Self::transmit) will have something to send if nothing arrives and nothing is queued.
    pub fn deadline_ms(&self) -> Option<u64> {
        if self.hello_due || (self.ack_due && self.known) || self.lost_due {
            return Some(0);
        }
        let hello = self.calls.then(|| self.next_hello_ms());
        let lost = self
            .waiting_since_ms
            .map(|since| since + self.timing.lost_ms);
        let pieces = self.queue.iter().take(WINDOW);
        let repeat = pieces.filter_map(|piece| piece.due_ms(&self.timing)).min();
        let repeat = repeat.filter(|_| self.known);
        [hello, lost, repeat].into_iter().flatten().min()
    }

    /// When the caller calls (again), or asks a silent peer whether it is there.
    fn next_hello_ms(&self) -> u64 {
        let again = self
            .hello_sent_ms
            .map_or(0, |sent| sent + self.timing.hello_ms);
        let silent = if self.known {
            self.heard_ms + self.timing.hello_ms
        } else {
            0
        };
        again.max(silent)
    }

    fn wants_hello(&self, now_ms: u64) -> bool {
        self.hello_due || (self.calls && self.next_hello_ms() <= now_ms)
    }

    /// Notices a peer that answers nothing.
    fn give_up(&mut self, now_ms: u64) {
        if self.calls && self.known && self.heard_ms + self.timing.hello_ms <= now_ms {
            self.waiting_since_ms.get_or_insert(now_ms);
        }
        if self
            .waiting_since_ms
            .is_some_and(|since| since + self.timing.lost_ms <= now_ms)
        {
            self.forget();
            self.lost_due = true;
        }
    }

    fn header(&self, kind: Kind, place: u8) -> Frame {
        let has = |bit: &usize| self.arrived.get(bit + 1).is_some_and(Option::is_some);
        Frame {
            kind,
            from: self.own,
            to: self.peer.unwrap_or(0),
            seq: self.first.wrapping_add(place),
            ack: self.expected,
            ack_after: (0..8).filter(has).fold(0, |bits, bit| bits | 1 << bit),
            payload: Vec::new(),
        }
    }
}

impl Piece {
    /// When it is to be sent (again); never, once it has arrived.
    fn due_ms(&self, timing: &Timing) -> Option<u64> {
        match self.sent {
            _ if self.acked => None,
            _ if self.missing => Some(0),
            None => Some(0),
            Some((sent_ms, _)) => {
                Some(sent_ms + (timing.repeat_ms << self.repeats.min(DOUBLINGS_MAX)))
            }
        }
    }
}

#[cfg(test)]
mod tests;
