//! The protocol between two ends over a line that a seeded injector damages.

use super::*;
use std::collections::VecDeque;

/// splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

/// One direction of the line: what was sent, not yet arrived.
#[derive(Default)]
struct Direction {
    bytes: VecDeque<u8>,
    cut: bool,
}

impl Direction {
    fn put(&mut self, frame: &[u8], random: &mut Random, damage_per_mille: u64) {
        for &byte in frame {
            if self.cut {
                continue;
            }
            if random.below(1000) >= damage_per_mille {
                self.bytes.push_back(byte);
                continue;
            }
            match random.below(3) {
                0 => self.bytes.push_back(byte ^ (1 << random.below(8))),
                1 => {}
                _ => self.bytes.extend([random.next() as u8, byte]),
            }
        }
    }
}

struct Line {
    caller: Box<Link>,
    called: Box<Link>,
    there: Direction,
    back: Direction,
    random: Random,
    damage_per_mille: u64,
    now_ms: u64,
    /// What each end was told.
    at_caller: std::vec::Vec<String>,
    at_called: std::vec::Vec<String>,
}

const TIMING: Timing = Timing {
    repeat_ms: 150,
    hello_ms: 500,
    lost_ms: 12_000,
};

impl Line {
    fn new(seed: u64, damage_per_mille: u64) -> Line {
        Line {
            caller: Box::new(Link::new(1, true, TIMING)),
            called: Box::new(Link::new(2, false, TIMING)),
            there: Direction::default(),
            back: Direction::default(),
            random: Random(seed),
            damage_per_mille,
            now_ms: 0,
            at_caller: std::vec::Vec::new(),
            at_called: std::vec::Vec::new(),
        }
    }

    /// A millisecond of a line that carries 11 bytes in it each way.
    fn step(&mut self) {
        self.now_ms += 1;
        let now = self.now_ms;
        let (there, back) = (&mut self.there, &mut self.back);
        let damage = (&mut self.random, self.damage_per_mille);
        turn(
            &mut self.caller,
            there,
            back,
            damage,
            now,
            &mut self.at_caller,
        );
        let damage = (&mut self.random, self.damage_per_mille);
        turn(
            &mut self.called,
            back,
            there,
            damage,
            now,
            &mut self.at_called,
        );
    }

    fn run(&mut self, ms: u64) {
        (0..ms).for_each(|_| self.step());
    }

    fn run_until(&mut self, ms_max: u64, done: impl Fn(&Line) -> bool) {
        let end = self.now_ms + ms_max;
        while !done(self) {
            assert!(
                self.now_ms < end,
                "not in {ms_max} ms; {:?}",
                self.caller.counts()
            );
            self.step();
        }
    }
}

/// One end's millisecond.
fn turn(
    link: &mut Link,
    out: &mut Direction,
    input: &mut Direction,
    (random, damage_per_mille): (&mut Random, u64),
    now: u64,
    told: &mut std::vec::Vec<String>,
) {
    for _ in 0..11 {
        let Some(byte) = input.bytes.pop_front() else {
            break;
        };
        link.feed(byte, now);
    }
    if out.bytes.len() < 11
        && let Some(wire) = link.transmit(now)
    {
        out.put(&wire, random, damage_per_mille);
    }
    while let Some(event) = link.event() {
        told.push(match event {
            Event::Message(bytes) => String::from_utf8(bytes.to_vec()).expect("intact"),
            other => format!("<{other:?}>"),
        });
    }
}

fn message(number: usize, random: &mut Random) -> String {
    let len = match random.below(10) {
        0 => random.below(2000),
        _ => random.below(40),
    };
    format!(
        "{number} {}",
        "airstream"
            .chars()
            .cycle()
            .take(len as usize)
            .collect::<String>()
    )
}

/// Messages both ways, each queued as soon as there is room.
fn exchange(line: &mut Line, count: usize) {
    let mut random = Random(line.random.next());
    let all: std::vec::Vec<String> = (0..count).map(|i| message(i, &mut random)).collect();
    let (mut to_called, mut to_caller) = (all.iter().peekable(), all.iter().peekable());
    let (from_caller, from_called) = (line.at_called.len(), line.at_caller.len());
    line.run_until(4_000_000, |line| {
        !line.at_caller.is_empty() && !line.at_called.is_empty()
    });
    let (had_caller, had_called) = (from_caller.max(1), from_called.max(1));
    while line.at_called.len() < had_caller + count || line.at_caller.len() < had_called + count {
        while to_called
            .next_if(|m| line.caller.send(m.as_bytes()).is_ok())
            .is_some()
        {}
        while to_caller
            .next_if(|m| line.called.send(m.as_bytes()).is_ok())
            .is_some()
        {}
        line.step();
        assert!(line.now_ms < 4_000_000, "{:?}", line.called.counts());
    }
    assert_eq!(&line.at_called[had_caller..], all);
    assert_eq!(&line.at_caller[had_called..], all);
}

#[test]
fn a_clean_line_carries_every_message_once_and_repeats_none() {
    let mut line = Line::new(1, 0);
    exchange(&mut line, 300);
    assert_eq!(
        (line.caller.counts().repeated, line.called.counts().repeated),
        (0, 0)
    );
    line.run(500);
    assert!(line.caller.is_idle() && line.called.is_idle());
}

#[test]
fn with_a_byte_in_a_hundred_damaged_every_message_arrives_intact_and_in_order() {
    for seed in 0..20 {
        let mut line = Line::new(seed, 10);
        exchange(&mut line, 150);
        assert!(
            line.caller.counts().damaged > 10,
            "{:?}",
            line.caller.counts()
        );
        assert_eq!(line.at_caller[0], "<Connected>");
    }
}

#[test]
fn the_longest_message_arrives_and_a_longer_one_is_refused() {
    let mut line = Line::new(3, 5);
    line.run_until(10_000, |line| !line.at_caller.is_empty());
    let long = "x".repeat(MESSAGE_MAX);
    assert_eq!(line.caller.send(long.as_bytes()), Ok(()));
    assert_eq!(line.caller.send(&[b'x'; MESSAGE_MAX + 1]), Err(Full));
    assert_eq!(line.caller.send(&[0; 70 * PAYLOAD_MAX]), Err(Full));
    line.run_until(60_000, |line| line.at_called.len() == 2);
    assert_eq!(line.at_called[1], long);
    assert_eq!(line.caller.send(b""), Ok(()));
    line.run_until(10_000, |line| line.at_called.len() == 3);
    assert_eq!(line.at_called[2], "");
}

#[test]
fn a_called_end_is_silent_until_it_is_called() {
    let mut link = Link::new(2, false, TIMING);
    assert_eq!(link.transmit(0), None);
    assert_eq!(link.transmit(100_000), None);
    assert_eq!(link.deadline_ms(), None);
}

#[test]
fn a_called_end_that_restarts_in_mid_frame_is_noticed() {
    for seed in 0..50 {
        let mut line = Line::new(seed, 10);
        exchange(&mut line, 3);
        line.called
            .send(b"half of this will be lost")
            .expect("room");
        line.caller.send(b"and this too, perhaps").expect("room");
        line.run(seed);
        *line.called = Link::new(77, false, TIMING);
        let told = line.at_caller.len();
        line.run_until(30_000, |line| {
            line.at_caller[told..].iter().any(|m| m == "<Connected>")
        });
        exchange_after(&mut line);
    }
}

#[test]
fn a_caller_that_restarts_in_mid_frame_is_noticed_even_with_its_old_number() {
    for seed in 0..50 {
        let mut line = Line::new(seed, 10);
        exchange(&mut line, 3);
        line.called
            .send(b"half of this will be lost")
            .expect("room");
        line.run(seed);
        let own = if seed % 2 == 0 { 1 } else { 99 };
        *line.caller = Link::new(own, true, TIMING);
        let told = line.at_called.len();
        line.run_until(30_000, |line| {
            line.at_called[told..].iter().any(|m| m == "<Connected>")
        });
        exchange_after(&mut line);
    }
}

/// The line carries messages, whatever it went through.
fn exchange_after(line: &mut Line) {
    line.run(2_000);
    line.caller.send(b"there").expect("room");
    line.run_until(60_000, |line| {
        line.at_called.last().is_some_and(|m| m == "there")
    });
    line.called.send(b"back").expect("room");
    line.run_until(60_000, |line| {
        line.at_caller.last().is_some_and(|m| m == "back")
    });
}

#[test]
fn an_unplugged_line_is_reported_at_both_ends_and_works_again_when_it_is_back() {
    let mut line = Line::new(9, 10);
    exchange(&mut line, 3);
    line.called.send(b"into the void").expect("room");
    (line.there.cut, line.back.cut) = (true, true);
    (line.at_caller, line.at_called) = Default::default();
    line.run(TIMING.lost_ms * 2);
    assert_eq!(line.at_called, ["<Lost>"]);
    assert_eq!(line.at_caller, ["<Lost>"]);
    assert!(line.called.is_idle());
    (line.there.cut, line.back.cut) = (false, false);
    line.run_until(10_000, |line| {
        line.at_caller.len() > 1 && line.at_called.len() > 1
    });
    assert_eq!(
        line.at_caller.last().map(String::as_str),
        Some("<Connected>")
    );
    exchange_after(&mut line);
}

#[test]
fn two_ends_that_drew_the_same_number_find_each_other() {
    let mut line = Line::new(1, 0);
    *line.called = Link::new(1, false, TIMING);
    line.run_until(6 * TIMING.hello_ms, |line| line.at_called.len() == 1);
    exchange(&mut line, 3);
}

#[test]
fn an_echo_of_itself_is_not_taken_for_a_peer() {
    let mut link = Link::new(5, true, TIMING);
    let hello = link.transmit(0).expect("it calls");
    hello.iter().for_each(|&byte| {
        link.feed(byte, 1);
    });
    assert_eq!(link.event(), None);
    assert_eq!(link.transmit(1), None);
}

#[test]
fn any_frames_from_a_peer_gone_mad_do_no_harm() {
    let mut random = Random(11);
    let mut link = Link::new(2, false, TIMING);
    for round in 0..20_000 {
        let frame = Frame {
            kind: [
                Kind::Hello,
                Kind::Data { last: false },
                Kind::Data { last: true },
                Kind::Ack,
            ][random.below(4) as usize],
            from: random.below(3) as u16,
            to: random.below(3) as u16,
            seq: random.below(256) as u8,
            ack: random.below(256) as u8,
            ack_after: random.next() as u8,
            payload: Vec::from_slice(&[7; PAYLOAD_MAX][..random.below(64) as usize]).unwrap(),
        };
        for byte in frame.encode() {
            link.feed(byte, round);
        }
        let _ = link.send(b"what the peer makes of this is its own affair");
        while link.event().is_some() {}
        link.transmit(round);
    }
}
