//! What happened when: reads, stalls and ops on one time line, for a person to look at the overlap.
//!
//! Events go to a ring that is taken before the first of them; when it is full
//! the oldest go. [`Trace::write`] turns it into Chrome's trace-event JSON,
//! which Perfetto and chrome://tracing load. A trace that is off costs a look
//! at an empty option for each event, and no clock is read.

use std::io::Write;
use std::time::Instant;

/// Events that are remembered: a hundred tokens of an 8B model and more.
const EVENTS_MAX: usize = 1 << 18;
/// Reads in flight that are told apart; more of them are left out.
const LANES_MAX: usize = 64;

/// What an event is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// One pass through all layers, for so many rows.
    Sweep(u32),
    /// The rows' embeddings are fetched.
    Embed,
    /// A group of matrices, from first tile to last: the first of them and their number.
    Matrices(u32, u32),
    /// Attention of a layer.
    Attention(u32),
    /// A token is chosen from the logits.
    Sample,
    /// The device computes with so many tiles.
    Compute(u32),
    /// Nothing to compute with: a read is waited for.
    Stall,
    /// A tile is read.
    Tile(u32),
    /// Single rows of a matrix are read.
    Row(u32),
}

#[derive(Debug, Clone, Copy)]
struct Event {
    what: What,
    begin_ns: u64,
    end_ns: u64,
    /// Of a read.
    bytes: u32,
    /// Of a read: which of those in flight.
    lane: u32,
}

/// A read in flight.
#[derive(Debug, Clone, Copy)]
struct Lane {
    token: u64,
    what: What,
    begin_ns: u64,
}

#[derive(Debug)]
struct Ring {
    started: Instant,
    events: Box<[Event]>,
    /// Events so far, those that were overwritten included.
    count: usize,
    lanes: [Option<Lane>; LANES_MAX],
}

impl Ring {
    fn now_ns(&self) -> u64 {
        self.started.elapsed().as_nanos() as u64
    }

    fn push(&mut self, event: Event) {
        let place = self.count % self.events.len();
        self.events[place] = event;
        self.count += 1;
    }
}

/// A recorder of events, or nothing.
#[derive(Debug, Default)]
pub struct Trace(Option<Box<Ring>>);

impl Trace {
    /// Memory that a trace takes while it is on.
    pub const BYTES: usize = EVENTS_MAX * size_of::<Event>();

    /// A trace that records from now on.
    pub fn on() -> Trace {
        Trace::with_room(EVENTS_MAX)
    }

    fn with_room(events: usize) -> Trace {
        let none = Event {
            what: What::Stall,
            begin_ns: 0,
            end_ns: 0,
            bytes: 0,
            lane: 0,
        };
        Trace(Some(Box::new(Ring {
            started: Instant::now(),
            events: vec![none; events].into(),
            count: 0,
            lanes: [None; LANES_MAX],
        })))
    }

    /// Forgets what was recorded so far, where its numbers mean something else from now on.
    pub fn clear(&mut self) {
        if let Some(ring) = &mut self.0 {
            (ring.count, ring.lanes) = (0, [None; LANES_MAX]);
        }
    }

    /// The time, for [`end`](Self::end).
    pub fn begin(&self) -> u64 {
        self.0.as_ref().map_or(0, |ring| ring.now_ns())
    }

    /// Records what began at `begin_ns` and ends now.
    pub fn end(&mut self, begin_ns: u64, what: What) {
        if let Some(ring) = &mut self.0 {
            let end_ns = ring.now_ns();
            ring.push(Event {
                what,
                begin_ns,
                end_ns,
                bytes: 0,
                lane: 0,
            });
        }
    }

    /// A read goes to the disk.
    pub fn submitted(&mut self, token: u64, what: What) {
        if let Some(ring) = &mut self.0 {
            let begin_ns = ring.now_ns();
            if let Some(lane) = ring.lanes.iter_mut().find(|lane| lane.is_none()) {
                *lane = Some(Lane {
                    token,
                    what,
                    begin_ns,
                });
            }
        }
    }

    /// A read's completion is seen, which may be a little after it happened.
    pub fn completed(&mut self, token: u64, bytes: u32) {
        if let Some(ring) = &mut self.0 {
            let end_ns = ring.now_ns();
            let of_token = |lane: &Option<Lane>| lane.is_some_and(|lane| lane.token == token);
            let found = ring.lanes.iter().position(of_token);
            if let Some((place, lane)) = found.and_then(|i| Some((i, ring.lanes[i].take()?))) {
                ring.push(Event {
                    what: lane.what,
                    begin_ns: lane.begin_ns,
                    end_ns,
                    bytes,
                    lane: place as u32,
                });
            }
        }
    }

    /// Writes the events and returns how many old ones had to go; `matrix_of` says which matrix a tile belongs to,
    /// `name` what a matrix is called.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write(
        &self,
        out: &mut impl Write,
        matrix_of: impl Fn(u32) -> u32,
        name: impl Fn(u32) -> String,
    ) -> std::io::Result<usize> {
        let Some(ring) = &self.0 else { return Ok(0) };
        let kept = ring.count.min(ring.events.len());
        let gone = ring.count - kept;
        writeln!(
            out,
            "{{\"displayTimeUnit\":\"ms\",\"otherData\":{{\"events_dropped\":{gone}}},\"traceEvents\":["
        )?;
        let title = |lane: u32| match lane {
            0 => "sweeps".to_owned(),
            1 => "ops".to_owned(),
            2 => "processor".to_owned(),
            read => format!("read {}", read - 2),
        };
        for lane in 0..3 + LANES_MAX as u32 {
            let used = |e: &Event| 3 + e.lane == lane && e.bytes > 0;
            if lane < 3 || ring.events[..kept].iter().any(used) {
                writeln!(
                    out,
                    "{{\"ph\":\"M\",\"name\":\"thread_name\",\"pid\":1,\"tid\":{lane},\"args\":{{\"name\":\"{}\"}}}},",
                    title(lane)
                )?;
            }
        }
        for number in gone..ring.count {
            let event = &ring.events[number % ring.events.len()];
            let text = |text: &str| serde_json::Value::from(text).to_string();
            let (lane, label, args) = match event.what {
                What::Sweep(rows) => (0, text("sweep"), format!("\"rows\":{rows}")),
                What::Embed => (1, text("embed"), String::new()),
                What::Matrices(first, count) => {
                    let names: Vec<String> = (first..first + count).map(&name).collect();
                    (1, text(&names.join(" ")), String::new())
                }
                What::Attention(layer) => (1, text("attention"), format!("\"layer\":{layer}")),
                What::Sample => (1, text("sample"), String::new()),
                What::Compute(tiles) => (2, text("compute"), format!("\"tiles\":{tiles}")),
                What::Stall => (2, text("stall"), String::new()),
                What::Tile(tile) => {
                    let args = format!("\"tile\":{tile},\"bytes\":{}", event.bytes);
                    (3 + event.lane, text(&name(matrix_of(tile))), args)
                }
                What::Row(matrix) => {
                    let args = format!("\"row\":true,\"bytes\":{}", event.bytes);
                    (3 + event.lane, text(&name(matrix)), args)
                }
            };
            let end = if number + 1 == ring.count { "" } else { "," };
            writeln!(
                out,
                "{{\"ph\":\"X\",\"pid\":1,\"tid\":{lane},\"name\":{label},\"ts\":{:.3},\"dur\":{:.3},\"args\":{{{args}}}}}{end}",
                event.begin_ns as f64 / 1e3,
                (event.end_ns - event.begin_ns) as f64 / 1e3,
            )?;
        }
        writeln!(out, "]}}")?;
        Ok(gone)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(trace: &Trace) -> (serde_json::Value, usize) {
        let mut out = Vec::new();
        let gone = trace
            .write(&mut out, |tile| tile / 10, |matrix| format!("m\"{matrix}"))
            .expect("a vector takes everything");
        (serde_json::from_slice(&out).expect("valid JSON"), gone)
    }

    #[test]
    fn reads_get_lanes_of_their_own_while_they_overlap() {
        let mut trace = Trace::with_room(100);
        trace.submitted(1, What::Tile(11));
        trace.submitted(2, What::Tile(25));
        trace.completed(1, 4096);
        trace.submitted(3, What::Row(7));
        trace.completed(3, 4096);
        trace.completed(2, 8192);
        let begin = trace.begin();
        trace.end(begin, What::Matrices(4, 2));
        let (json, gone) = written(&trace);
        let events = json["traceEvents"].as_array().expect("a list").iter();
        let seen: Vec<(String, u64)> = events
            .filter(|e| e["ph"] == "X")
            .map(|e| {
                let name = e["name"].as_str().expect("a name").to_owned();
                (name, e["tid"].as_u64().expect("a lane"))
            })
            .collect();
        let expected = [("m\"1", 3), ("m\"7", 3), ("m\"2", 4), ("m\"4 m\"5", 1)];
        assert_eq!(seen, expected.map(|(name, lane)| (name.to_owned(), lane)));
        assert_eq!(gone, 0);
    }

    #[test]
    fn the_oldest_events_go_when_the_ring_is_full() {
        let mut trace = Trace::with_room(4);
        for layer in 0..10 {
            trace.end(0, What::Attention(layer));
        }
        let (json, gone) = written(&trace);
        let events = json["traceEvents"].as_array().expect("a list").iter();
        let layers: Vec<u64> = events.filter_map(|e| e["args"]["layer"].as_u64()).collect();
        assert_eq!((layers, gone), (vec![6, 7, 8, 9], 6));
        assert_eq!(json["otherData"]["events_dropped"], 6);
    }

    #[test]
    fn a_trace_that_is_off_records_nothing() {
        let mut trace = Trace::default();
        trace.end(trace.begin(), What::Stall);
        trace.submitted(1, What::Tile(1));
        trace.completed(1, 1);
        let mut out = Vec::new();
        trace
            .write(&mut out, |t| t, |m| m.to_string())
            .expect("a vector takes everything");
        assert!(out.is_empty());
    }
}
