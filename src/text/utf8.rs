//! Bytes of tokens in, whole characters out.

/// Puts characters together whose bytes come in several tokens.
///
/// Holds back at most three bytes, the start of a character; bytes that cannot
/// be part of one come out as U+FFFD. Never allocates.
#[derive(Debug, Default, Clone)]
pub struct Utf8Stream {
    /// The start of a character whose end has not come yet.
    held: [u8; 4],
    held_len: usize,
}

impl Utf8Stream {
    /// A stream with nothing held back.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next bytes and calls `out` for the text that they complete, in order.
    pub fn push(&mut self, bytes: &[u8], mut out: impl FnMut(&str)) {
        let mut rest = bytes;
        while self.held_len > 0 {
            let Some((&next, after)) = rest.split_first() else {
                return;
            };
            self.held[self.held_len] = next;
            match std::str::from_utf8(&self.held[..=self.held_len]) {
                Ok(whole) => {
                    out(whole);
                    self.held_len = 0;
                    rest = after;
                }
                // The character still goes on.
                Err(error) if error.error_len().is_none() => {
                    self.held_len += 1;
                    rest = after;
                }
                // It does not go on with this byte, which may start another one.
                Err(_) => self.finish(&mut out),
            }
        }
        while !rest.is_empty() {
            match std::str::from_utf8(rest) {
                Ok(text) => return out(text),
                Err(error) => {
                    let (text, broken) = rest.split_at(error.valid_up_to());
                    if !text.is_empty() {
                        out(std::str::from_utf8(text).expect("valid up to here"));
                    }
                    let Some(invalid) = error.error_len() else {
                        self.held[..broken.len()].copy_from_slice(broken);
                        self.held_len = broken.len();
                        return;
                    };
                    out("\u{fffd}");
                    rest = &broken[invalid..];
                }
            }
        }
    }

    /// Ends the text: what was held back comes out as U+FFFD.
    pub fn finish(&mut self, mut out: impl FnMut(&str)) {
        if self.held_len > 0 {
            self.held_len = 0;
            out("\u{fffd}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Utf8Stream;
    use proptest::prelude::*;

    fn stream<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> String {
        let (mut stream, mut text) = (Utf8Stream::new(), String::new());
        for piece in pieces {
            stream.push(piece, |part| text.push_str(part));
        }
        stream.finish(|part| text.push_str(part));
        text
    }

    #[test]
    fn a_character_waits_for_its_last_byte() {
        let mut stream = Utf8Stream::new();
        let mut seen = Vec::new();
        for byte in "a\u{1f980}b".as_bytes() {
            stream.push(&[*byte], |part| seen.push(part.to_owned()));
        }
        assert_eq!(seen, ["a", "\u{1f980}", "b"]);
    }

    #[test]
    fn broken_characters_are_replaced() {
        assert_eq!(stream([&b"\xf0\x9f"[..], b"a"]), "\u{fffd}a");
        assert_eq!(stream([&b"\xff\xfe"[..]]), "\u{fffd}\u{fffd}");
        assert_eq!(stream([&b"\xe2\x82"[..]]), "\u{fffd}");
    }

    proptest! {
        #[test]
        fn any_cut_of_any_bytes_is_the_lossy_text(bytes in any::<Vec<u8>>(), size in 1usize..5) {
            prop_assert_eq!(stream(bytes.chunks(size)), String::from_utf8_lossy(&bytes));
        }
    }
}
