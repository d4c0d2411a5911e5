//! Frames on a serial line: what two ends tell each other in one piece that is whole or not there at all.
//!
//! On the wire a frame is a header, at most [`PAYLOAD_MAX`] bytes of payload and a CRC-32 of both, all COBS-coded, and
//! a zero byte. COBS leaves no zero inside, so a receiver that joins in the middle, or lost its place, finds the next
//! frame at the next zero.
//!
//! | bytes | field |
//! |---|---|
//! | 1 | kind: 0 hello, 1 data, 2 acknowledgement; bit 7 on data: the message ends here |
//! | 2 | the sender's incarnation, little-endian |
//! | 2 | the receiver's incarnation as the sender knows it; 0: not at all |
//! | 1 | data: number of this frame |
//! | 1 | number of the data frame that the sender waits for |
//! | 1 | which of those after it have arrived, the next one in the lowest bit |
//! | 0 to 64 | payload |
//! | 4 | CRC-32 (as in zlib and Ethernet), little-endian |

use crc::{CRC_32_ISO_HDLC, Crc, Table};
use heapless::Vec;

/// Payload of a frame. Short, because a noisy line damages long frames more often than it carries them: with one byte
/// in a hundred damaged, 46% of full frames of this size arrive.
pub const PAYLOAD_MAX: usize = 64;
const HEADER_BYTES: usize = 8;
const CRC_BYTES: usize = 4;
/// Header, payload and CRC.
const CONTENT_MAX: usize = HEADER_BYTES + PAYLOAD_MAX + CRC_BYTES;
/// A frame on the wire: COBS adds one byte to so short a content, and a zero before and after it.
pub const WIRE_MAX: usize = CONTENT_MAX + 3;

const CRC: Crc<u32, Table<1>> = Crc::<u32, Table<1>>::new(&CRC_32_ISO_HDLC);
const LAST: u8 = 0x80;

/// A frame as it goes over the line.
pub type Wire = Vec<u8, WIRE_MAX>;

/// What a frame is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Makes incarnations known.
    Hello,
    /// Carries a piece of a message.
    Data {
        /// Whether the message ends with this piece.
        last: bool,
    },
    /// Carries nothing but the header's acknowledgement.
    Ack,
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What it is for.
    pub kind: Kind,
    /// The sender's incarnation.
    pub from: u16,
    /// The receiver's, as the sender knows it; 0 if it does not.
    pub to: u16,
    /// Number of a data frame.
    pub seq: u8,
    /// The data frame that the sender waits for.
    pub ack: u8,
    /// Bit i: data frame `ack + 1 + i` has arrived.
    pub ack_after: u8,
    /// A piece of a message.
    pub payload: Vec<u8, PAYLOAD_MAX>,
}

impl Frame {
    /// The frame as it goes over the line. It begins with a zero as well as ending with one, so that noise before it
    /// costs no more than the noise.
    pub fn encode(&self) -> Wire {
        let kind = match self.kind {
            Kind::Hello => 0,
            Kind::Data { last } => 1 | if last { LAST } else { 0 },
            Kind::Ack => 2,
        };
        let mut content = Vec::<u8, CONTENT_MAX>::new();
        let (from, to) = (self.from.to_le_bytes(), self.to.to_le_bytes());
        let header = [
            kind,
            from[0],
            from[1],
            to[0],
            to[1],
            self.seq,
            self.ack,
            self.ack_after,
        ];
        let parts = [&header[..], &self.payload[..]];
        for part in parts {
            content
                .extend_from_slice(part)
                .expect("sized for a full frame");
        }
        let crc = CRC.checksum(&content).to_le_bytes();
        content
            .extend_from_slice(&crc)
            .expect("sized for a full frame");
        let mut wire = Wire::new();
        wire.resize_default(WIRE_MAX).expect("its own size");
        let coded = cobs::encode(&content, &mut wire[1..]);
        wire.truncate(coded + 2);
        wire[coded + 1] = 0;
        wire
    }

    /// Reads the content of a frame, without the zeros around it.
    fn decode(coded: &mut [u8]) -> Option<Frame> {
        let len = cobs::decode_in_place(coded).ok()?;
        let content = coded.get(..len)?;
        let (checked, crc) = content.split_last_chunk::<CRC_BYTES>()?;
        if CRC.checksum(checked) != u32::from_le_bytes(*crc) {
            return None;
        }
        let (header, payload) = checked.split_first_chunk::<HEADER_BYTES>()?;
        let &[kind, from0, from1, to0, to1, seq, ack, ack_after] = header;
        let kind = match kind {
            0 => Kind::Hello,
            1 => Kind::Data { last: false },
            k if k == 1 | LAST => Kind::Data { last: true },
            2 => Kind::Ack,
            _ => return None,
        };
        Some(Frame {
            kind,
            from: u16::from_le_bytes([from0, from1]),
            to: u16::from_le_bytes([to0, to1]),
            seq,
            ack,
            ack_after,
            payload: Vec::from_slice(payload).ok()?,
        })
    }
}

/// What the bytes between two zeros turned out to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Read {
    /// A whole frame.
    Frame(Frame),
    /// Something else: noise, or a frame that suffered from it.
    Damaged,
}

/// Finds frames in a stream of bytes.
#[derive(Debug, Default)]
pub struct Reader {
    coded: Vec<u8, WIRE_MAX>,
    too_long: bool,
}

impl Reader {
    /// Takes the next byte; at a zero, says what lay before it.
    pub fn push(&mut self, byte: u8) -> Option<Read> {
        if byte != 0 {
            self.too_long |= self.coded.push(byte).is_err();
            return None;
        }
        let nothing = self.coded.is_empty();
        let frame = if self.too_long {
            None
        } else {
            Frame::decode(&mut self.coded)
        };
        self.coded.clear();
        self.too_long = false;
        match frame {
            Some(frame) => Some(Read::Frame(frame)),
            None if nothing => None,
            None => Some(Read::Damaged),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame(payload: &[u8]) -> Frame {
        Frame {
            kind: Kind::Data { last: true },
            from: 0x1234,
            to: 0,
            seq: 255,
            ack: 0,
            ack_after: 0x81,
            payload: Vec::from_slice(payload).unwrap(),
        }
    }

    fn read(bytes: &[u8]) -> std::vec::Vec<Read> {
        let mut reader = Reader::default();
        bytes.iter().filter_map(|&b| reader.push(b)).collect()
    }

    #[test]
    fn the_wire_form_is_what_the_table_says() {
        let wire = frame(&[7]).encode();
        // 0x00, code of 3 bytes up to a zero, 0x81 0x34 0x12, ...
        assert_eq!(&wire[..5], &[0, 4, 0x81, 0x34, 0x12]);
        assert_eq!(wire.last(), Some(&0));
        assert_eq!(wire.iter().filter(|&&b| b == 0).count(), 2);
        assert_eq!(frame(&[0xff; PAYLOAD_MAX]).encode().len(), WIRE_MAX);
    }

    #[test]
    fn noise_before_a_frame_costs_only_itself() {
        let mut bytes = std::vec![9u8; 500];
        bytes.extend_from_slice(&frame(b"robot").encode());
        assert_eq!(read(&bytes), [Read::Damaged, Read::Frame(frame(b"robot"))]);
    }

    proptest! {
        #[test]
        fn any_payload_comes_back(payload in proptest::collection::vec(any::<u8>(), 0..=PAYLOAD_MAX)) {
            prop_assert_eq!(read(&frame(&payload).encode()), [Read::Frame(frame(&payload))]);
        }

        #[test]
        fn a_flipped_byte_is_never_a_frame(at in 1usize..40, flip in 1u8..=255) {
            let mut wire = frame(&[1, 0, 2, 0, 0, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7])
                .encode();
            let at = at.min(wire.len() - 2);
            wire[at] ^= flip;
            let damaged = |read: &Read| *read == Read::Damaged;
            prop_assert!(read(&wire).iter().all(damaged));
        }

        #[test]
        fn any_bytes_do_no_harm(bytes in any::<std::vec::Vec<u8>>()) {
            read(&bytes);
        }
    }
}
