//! A line typed on a terminal: what to echo, and when it is whole. Backspace and Ctrl-U correct it, Ctrl-C cancels.

use heapless::Vec;

/// Bytes of a line at most.
pub const LINE_BYTES_MAX: usize = 1024;

const BACKSPACE: u8 = 0x08;
const DELETE: u8 = 0x7f;
/// Ends an answer, or drops the line.
pub const CTRL_C: u8 = 0x03;
const CTRL_U: u8 = 0x15;
const ESCAPE: u8 = 0x1b;
const BELL: &[u8] = b"\x07";

/// What a typed byte led to.
#[derive(Debug, PartialEq, Eq)]
pub enum Typed<'a> {
    /// Show these bytes.
    Echo(Vec<u8, 8>),
    /// Take back so many columns.
    Erase(usize),
    /// The line is whole. It may be empty.
    Line(&'a str),
    /// Ctrl-C.
    Cancel,
    /// Nothing to show.
    Nothing,
}

/// The line so far.
#[derive(Debug, Default)]
pub struct Editor {
    line: Vec<u8, LINE_BYTES_MAX>,
    /// The line was handed out; the next begins.
    over: bool,
    /// The last byte was a carriage return: a newline after it is the same end.
    returned: bool,
    escape: Escape,
}

/// How far into an escape sequence, such as an arrow key's, the typed bytes are.
#[derive(Debug, Default, PartialEq, Eq)]
enum Escape {
    #[default]
    None,
    Begun,
    Inside,
}

impl Editor {
    /// Takes a typed byte.
    pub fn push(&mut self, byte: u8) -> Typed<'_> {
        if std::mem::take(&mut self.over) {
            self.line.clear();
        }
        let after_return = std::mem::replace(&mut self.returned, byte == b'\r');
        match (&self.escape, byte) {
            (Escape::None, ESCAPE) => self.escape = Escape::Begun,
            (Escape::Begun, b'[' | b'O') => self.escape = Escape::Inside,
            (Escape::Inside, 0x20..=0x3f) => {}
            (Escape::Begun | Escape::Inside, _) => self.escape = Escape::None,
            (Escape::None, _) => return self.key(byte, after_return),
        }
        Typed::Nothing
    }

    fn key(&mut self, byte: u8, after_return: bool) -> Typed<'_> {
        match byte {
            b'\n' if after_return => Typed::Nothing,
            b'\r' | b'\n' => {
                self.over = true;
                match std::str::from_utf8(&self.line) {
                    Ok(_) => {}
                    // A damaged character: what it was nobody knows, the rest still means something.
                    Err(_) => self.line.retain(u8::is_ascii),
                }
                Typed::Line(std::str::from_utf8(&self.line).expect("valid, or ASCII"))
            }
            CTRL_C => {
                self.line.clear();
                Typed::Cancel
            }
            CTRL_U => {
                let columns = columns(&self.line);
                self.line.clear();
                Typed::Erase(columns)
            }
            BACKSPACE | DELETE => {
                let before = columns(&self.line);
                while let Some(byte) = self.line.pop() {
                    if !is_continuation(byte) {
                        break;
                    }
                }
                Typed::Erase(before - columns(&self.line))
            }
            b'\t' => self.add(b' '),
            0x00..0x20 => Typed::Nothing,
            byte => self.add(byte),
        }
    }

    fn add(&mut self, byte: u8) -> Typed<'_> {
        let shown = match self.line.push(byte) {
            Ok(()) => &[byte][..],
            Err(_) => BELL,
        };
        Typed::Echo(Vec::from_slice(shown).expect("one byte"))
    }
}

fn is_continuation(byte: u8) -> bool {
    byte & 0xc0 == 0x80
}

/// Characters, each of which is taken for a column.
fn columns(line: &[u8]) -> usize {
    line.iter().filter(|&&byte| !is_continuation(byte)).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The lines, and what the terminal shows.
    fn typed(bytes: &[u8]) -> (std::vec::Vec<String>, String) {
        let (mut editor, mut lines, mut shown) = (
            Editor::default(),
            std::vec::Vec::new(),
            std::vec::Vec::new(),
        );
        for &byte in bytes {
            match editor.push(byte) {
                Typed::Echo(bytes) => shown.extend_from_slice(&bytes),
                Typed::Erase(columns) => shown.extend_from_slice("<".repeat(columns).as_bytes()),
                Typed::Line(line) => lines.push(line.to_owned()),
                Typed::Cancel => lines.push("^C".to_owned()),
                Typed::Nothing => {}
            }
        }
        (lines, String::from_utf8_lossy(&shown).into_owned())
    }

    #[test]
    fn lines_are_edited_as_people_expect() {
        assert_eq!(
            typed(b"hi\r\nyou\n\r"),
            (vec!["hi".into(), "you".into(), "".into()], "hiyou".into())
        );
        assert_eq!(
            typed(b"ab\x7fc\x08\x08\x08d\r"),
            (vec!["d".into()], "ab<c<<d".into())
        );
        assert_eq!(
            typed("x\u{1f980}\x7fy\r".as_bytes()),
            (vec!["xy".into()], "x\u{1f980}<y".into())
        );
        assert_eq!(
            typed(b"what\x03now\r"),
            (vec!["^C".into(), "now".into()], "whatnow".into())
        );
        assert_eq!(typed(b"abc\x15d\r"), (vec!["d".into()], "abc<<<d".into()));
        assert_eq!(
            typed(b"\x1b[A\x1b[1;5Ca\x1bOPb\r"),
            (vec!["ab".into()], "ab".into())
        );
        assert_eq!(typed(b"a\xffb\r").0, ["ab"]);
    }

    #[test]
    fn a_line_that_is_too_long_rings() {
        let (lines, shown) = typed(&[&[b'a'; LINE_BYTES_MAX + 3][..], b"\r"].concat());
        assert_eq!(lines[0].len(), LINE_BYTES_MAX);
        assert!(shown.ends_with("a\x07\x07\x07"));
    }

    proptest! {
        #[test]
        fn any_bytes_do_no_harm(bytes in any::<std::vec::Vec<u8>>()) {
            typed(&bytes);
        }
    }
}
