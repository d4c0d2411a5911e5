//! Lines of bounded length out of a stream, whatever a client sends.

use std::io;

use tokio::io::{AsyncBufRead, AsyncBufReadExt};

/// What a line buffer keeps between lines; a longer line's memory is given back.
const KEPT_BYTES: usize = 16 << 10;

/// What came.
#[derive(Debug, PartialEq, Eq)]
pub enum Line<'a> {
    /// A line, without its end.
    Whole(&'a [u8]),
    /// A line longer than allowed; none of it was kept.
    TooLong,
}

/// Reads lines of at most `bytes_max` bytes.
#[derive(Debug)]
pub struct Lines<R> {
    input: R,
    bytes_max: usize,
    line: Vec<u8>,
    too_long: bool,
    /// The line was handed out; the next begins.
    over: bool,
}

impl<R: AsyncBufRead + Unpin> Lines<R> {
    /// Reads from `input`.
    pub fn new(input: R, bytes_max: usize) -> Lines<R> {
        Lines {
            input,
            bytes_max,
            line: Vec::new(),
            too_long: false,
            over: false,
        }
    }

    /// The next line that is not empty; none at the end. What follows the last newline is no line: its sender went
    /// away in the middle of it.
    ///
    /// May be dropped and called again without losing anything.
    pub async fn next(&mut self) -> io::Result<Option<Line<'_>>> {
        loop {
            if self.over {
                self.forget();
            }
            let bytes = self.input.fill_buf().await?;
            if bytes.is_empty() {
                return Ok(None);
            }
            let newline = bytes.iter().position(|&byte| byte == b'\n');
            let part = &bytes[..newline.unwrap_or(bytes.len())];
            if self.too_long || self.line.len() + part.len() > self.bytes_max {
                self.too_long = true;
                self.line = Vec::new();
            } else {
                make_room(&mut self.line, part.len(), self.bytes_max);
                self.line.extend_from_slice(part);
            }
            let taken = part.len() + usize::from(newline.is_some());
            self.input.consume(taken);
            if newline.is_none() {
                continue;
            }
            self.over = true;
            if self.too_long {
                return Ok(Some(Line::TooLong));
            }
            if self.line.last() == Some(&b'\r') {
                self.line.pop();
            }
            if !self.line.is_empty() {
                return Ok(Some(Line::Whole(&self.line)));
            }
        }
    }
}

impl<R> Lines<R> {
    /// Gives the memory of the line back that was handed out last.
    pub fn forget(&mut self) {
        self.over = false;
        self.line.clear();
        self.line.shrink_to(KEPT_BYTES);
        self.too_long = false;
    }
}

/// Takes memory for so many more bytes, twice as much as there is where that is allowed.
pub(super) fn make_room(bytes: &mut Vec<u8>, more: usize, bytes_max: usize) {
    let wanted = bytes.len() + more;
    if wanted > bytes.capacity() {
        let doubled = (2 * bytes.capacity()).min(bytes_max);
        bytes.reserve_exact(doubled.max(wanted) - bytes.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::BufReader;

    fn lines(text: &[u8], buffer: usize) -> Vec<Option<Vec<u8>>> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        runtime.block_on(async {
            let mut lines = Lines::new(BufReader::with_capacity(buffer, text), 10);
            let mut all = Vec::new();
            while let Some(line) = lines.next().await.unwrap() {
                all.push(match line {
                    Line::Whole(bytes) => Some(bytes.to_vec()),
                    Line::TooLong => None,
                });
            }
            assert!(lines.line.capacity() <= KEPT_BYTES);
            all
        })
    }

    #[test]
    fn lines_are_whole_wherever_the_stream_is_cut() {
        let text = b"one\n\r\n\ntwo\r\n0123456789\n0123456789A\nthree\nhalf";
        let whole = |text: &str| Some(text.as_bytes().to_vec());
        for buffer in [1, 2, 3, 7, 100] {
            let wanted = [
                whole("one"),
                whole("two"),
                whole("0123456789"),
                None,
                whole("three"),
            ];
            assert_eq!(lines(text, buffer), wanted, "{buffer}");
        }
    }

    #[test]
    fn a_line_without_end_takes_no_memory() {
        let mut text = vec![b'x'; 3 << 20];
        text.extend_from_slice(b"\nok\n");
        assert_eq!(lines(&text, 4096), [None, Some(b"ok".to_vec())]);
    }
}
