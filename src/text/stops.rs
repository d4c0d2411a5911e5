//! Ends an answer where a stop string begins, wherever tokens cut it.

/// Finds the first of some strings in a text that comes in pieces, and holds back what may become one.
///
/// At most one byte less than the longest string is held back. Nothing is allocated after construction.
#[derive(Debug, Default)]
pub struct Stops {
    strings: Box<[Box<str>]>,
    /// The end of the text so far, as far as some string may begin with it.
    held: String,
}

impl Stops {
    /// Empty strings are left out: they would end every answer before it begins.
    pub fn new(strings: &[String]) -> Stops {
        let strings: Box<[Box<str>]> = strings
            .iter()
            .filter(|string| !string.is_empty())
            .map(|string| string.as_str().into())
            .collect();
        let longest = strings.iter().map(|string| string.len()).max();
        Stops {
            held: String::with_capacity(longest.unwrap_or(0) + char::MAX.len_utf8()),
            strings,
        }
    }

    /// Takes the next piece and calls `out` for the text that is sure to come before any stop string.
    ///
    /// Answers whether a stop string is complete; the text has ended then.
    pub fn push(&mut self, piece: &str, mut out: impl FnMut(&str)) -> bool {
        if self.strings.is_empty() {
            out(piece);
            return false;
        }
        for character in piece.chars() {
            self.held.push(character);
            // Of strings that end here, the one that began first.
            let ended = self
                .strings
                .iter()
                .filter(|string| self.held.ends_with(&***string))
                .map(|string| string.len())
                .max();
            if let Some(length) = ended {
                let before = self.held.len() - length;
                if before > 0 {
                    out(&self.held[..before]);
                }
                self.held.clear();
                return true;
            }
            let sure = self.sure();
            if sure > 0 {
                out(&self.held[..sure]);
                self.held.drain(..sure);
            }
        }
        false
    }

    /// Bytes at the front of what is held that no string can begin in.
    fn sure(&self) -> usize {
        let starts = self.held.char_indices().map(|(at, _)| at);
        let mut begun = starts.filter(|&at| {
            let end = &self.held[at..];
            self.strings.iter().any(|string| string.starts_with(end))
        });
        begun.next().unwrap_or(self.held.len())
    }

    /// Ends the text: what was held back belongs to it.
    pub fn finish(&mut self, mut out: impl FnMut(&str)) {
        if !self.held.is_empty() {
            out(&self.held);
            self.held.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Stops;
    use proptest::prelude::*;

    /// The text that comes out, and whether a stop string was found.
    fn through(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let strings: Vec<String> = stops.iter().map(|stop| (*stop).to_owned()).collect();
        let (mut stops, mut text) = (Stops::new(&strings), String::new());
        for piece in pieces {
            if stops.push(piece, |part| text.push_str(part)) {
                return (text, true);
            }
        }
        stops.finish(|part| text.push_str(part));
        (text, false)
    }

    #[test]
    fn a_string_is_found_across_pieces() {
        assert_eq!(
            through(&["\n\nUser:"], &["Yes.\n", "\nUs", "er: no"]),
            ("Yes.".into(), true)
        );
        assert_eq!(
            through(&["\n\nUser:"], &["Yes.\n", "\nUs", "e"]),
            ("Yes.\n\nUse".into(), false)
        );
    }

    #[test]
    fn only_what_may_become_a_string_is_held_back() {
        let mut stops = Stops::new(&["aab".into()]);
        let mut seen = Vec::new();
        for piece in ["xaa", "a", "c"] {
            assert!(!stops.push(piece, |part| seen.push(part.to_owned())));
        }
        // Of `aaa` the first can be no start any more, the others can.
        assert_eq!(seen.concat(), "xaaac");
        assert_eq!(seen[..2], ["x", "a"]);
    }

    #[test]
    fn the_first_end_counts_and_of_these_the_first_start() {
        assert_eq!(through(&["bc", "abcd"], &["xabcd"]), ("xa".into(), true));
        assert_eq!(through(&["cd", "abcd"], &["xabcd"]), ("x".into(), true));
        assert_eq!(through(&["", "d"], &["abcd"]), ("abc".into(), true));
        assert_eq!(through(&[""], &["abcd"]), ("abcd".into(), false));
    }

    /// The text before the string that ends first, found by looking at every prefix.
    fn naive(stops: &[String], text: &str) -> (String, bool) {
        let ends = (0..=text.len()).filter(|&at| text.is_char_boundary(at));
        for end in ends {
            let found = stops
                .iter()
                .filter(|stop| !stop.is_empty() && text[..end].ends_with(stop.as_str()))
                .map(|stop| stop.len())
                .max();
            if let Some(length) = found {
                return (text[..end - length].to_owned(), true);
            }
        }
        (text.to_owned(), false)
    }

    proptest! {
        #[test]
        fn any_cut_gives_what_the_whole_text_gives(
            stops in prop::collection::vec("[ab\u{e9}]{0,4}", 0..4),
            pieces in prop::collection::vec("[abc\u{e9}]{0,5}", 0..8),
        ) {
            let stop_refs: Vec<&str> = stops.iter().map(String::as_str).collect();
            let piece_refs: Vec<&str> = pieces.iter().map(String::as_str).collect();
            prop_assert_eq!(through(&stop_refs, &piece_refs), naive(&stops, &pieces.concat()));
        }
    }
}
