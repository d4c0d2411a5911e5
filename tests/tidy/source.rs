//! Rust source as the tidy test sees it: code without comments and strings, and comments without code.

/// One file. `code` and `comments` have the same length and line ends as the text; what belongs to
/// the other is blank.
pub struct Source {
    /// The text with comments and the insides of strings and characters blanked.
    pub code: String,
    /// The text with all but comments blanked.
    pub comments: String,
}

impl Source {
    /// Separate comments from code.
    pub fn new(text: &str) -> Source {
        let chars: Vec<char> = text.chars().collect();
        let (mut code, mut comments) = (String::new(), String::new());
        let mut at = 0;
        while at < chars.len() {
            let (kind, end) = piece(&chars, at);
            for &c in &chars[at..end] {
                let blank = if c == '\n' { '\n' } else { ' ' };
                code.push(if kind == Piece::Code { c } else { blank });
                comments.push(if kind == Piece::Comment { c } else { blank });
            }
            at = end;
        }
        Source { code, comments }
    }

    /// The same file with its inline `#[cfg(test)]` modules blanked.
    pub fn without_tests(&self) -> Source {
        let mut keep: Vec<char> = self.code.chars().collect();
        let mut comments: Vec<char> = self.comments.chars().collect();
        let text = self.code.as_str();
        for (at, mark) in text.match_indices("#[cfg(test)]") {
            let rest = text[at + mark.len()..].trim_start();
            let inline =
                rest.starts_with("mod ") && rest.find('{') < rest.find(';').or(Some(usize::MAX));
            if !inline {
                continue;
            }
            let start = text[..at].chars().count();
            let mut depth = 0;
            for i in start..keep.len() {
                let c = keep[i];
                depth += i32::from(c == '{') - i32::from(c == '}');
                for side in [&mut keep, &mut comments] {
                    if side[i] != '\n' {
                        side[i] = ' ';
                    }
                }
                if c == '}' && depth == 0 {
                    break;
                }
            }
        }
        Source {
            code: keep.into_iter().collect(),
            comments: comments.into_iter().collect(),
        }
    }

    /// Line numbers (from 1) on which `side` (code or comments) has `word`, not as a part of a longer one.
    pub fn lines_with(&self, side: &str, word: &str) -> Vec<usize> {
        let whole = |line: &str| {
            line.match_indices(word)
                .any(|(at, _)| !word.starts_with(char::is_alphanumeric) || word_starts_at(line, at))
        };
        side.lines()
            .enumerate()
            .filter(|(_, line)| whole(line))
            .map(|(index, _)| index + 1)
            .collect()
    }

    /// Modules of the crate's root that the code names, with their lines: `crate::x`, `crate::{x, y}`, and
    /// as many `super::` as lead to the root from a module `depth` deep.
    pub fn crate_paths(&self, depth: usize) -> Vec<(usize, String)> {
        let supers = "super::".repeat(depth);
        let mut found = Vec::new();
        for (prefix, exact) in [("crate::", true), (supers.as_str(), false)] {
            for (at, _) in self.code.match_indices(prefix) {
                // `$crate::` in a macro is the same path.
                let starts = word_starts_at(&self.code, at) && !self.code[..at].ends_with("::");
                if !starts && exact {
                    continue;
                }
                let line = self.code[..at].matches('\n').count() + 1;
                let rest = &self.code[at + prefix.len()..];
                for name in first_names(rest) {
                    if name != "super" {
                        found.push((line, name));
                    }
                }
            }
        }
        found
    }

    /// Lines (from 1) where unsafe code begins: blocks, functions, implementations; not function types.
    pub fn unsafe_lines(&self) -> Vec<usize> {
        let mut found = Vec::new();
        for (at, word) in self.code.match_indices("unsafe") {
            let rest = self.code[at + word.len()..].trim_start();
            let block =
                rest.starts_with('{') || rest.starts_with("impl") || rest.starts_with("trait");
            let named =
                rest.starts_with("fn ") || (rest.starts_with("extern") && !rest.contains("fn("));
            let attribute = self.code[..at].ends_with('(');
            // A trait says once what its implementors' callers promise.
            let promised = named && in_trait_impl(&self.code[..at]);
            if word_starts_at(&self.code, at) && (block || named) && !attribute && !promised {
                found.push(self.code[..at].matches('\n').count() + 1);
            }
        }
        found
    }

    /// True when the statement or item with `unsafe` on this line has a comment that says why it is sound.
    pub fn is_documented_unsafe(&self, line: usize) -> bool {
        let code: Vec<&str> = self.code.lines().collect();
        let comments: Vec<&str> = self.comments.lines().collect();
        let says = |index: usize| {
            comments[index].contains("SAFETY:") || comments[index].contains("# Safety")
        };
        if says(line - 1) {
            return true;
        }
        for index in (0..line - 1).rev() {
            if says(index) {
                return true;
            }
            let above = code[index].trim();
            let only_comment = above.is_empty() && !comments[index].trim().is_empty();
            let attribute = above.starts_with("#[") || above.starts_with("#![");
            let ended = above.is_empty() || above.ends_with([';', '{', '}']);
            if !only_comment && !attribute && ended {
                return false;
            }
        }
        false
    }
}

#[derive(PartialEq, Clone, Copy)]
enum Piece {
    Code,
    Comment,
    Quoted,
}

/// The piece of source that begins at `at`, and where it ends.
fn piece(chars: &[char], at: usize) -> (Piece, usize) {
    let next = |offset: usize| chars.get(at + offset).copied().unwrap_or(' ');
    let until = |from: usize, end: &dyn Fn(usize) -> bool| {
        (from..chars.len()).find(|&i| end(i)).unwrap_or(chars.len())
    };
    match (chars[at], next(1)) {
        ('/', '/') => (Piece::Comment, until(at, &|i| chars[i] == '\n')),
        ('/', '*') => {
            let mut depth = 0;
            let mut i = at;
            while i < chars.len() {
                match (chars[i], chars.get(i + 1)) {
                    ('/', Some('*')) => (depth, i) = (depth + 1, i + 2),
                    ('*', Some('/')) => (depth, i) = (depth - 1, i + 2),
                    _ => i += 1,
                }
                if depth == 0 {
                    break;
                }
            }
            (Piece::Comment, i.min(chars.len()))
        }
        ('"', _) => {
            let mut i = at + 1;
            while i < chars.len() && chars[i] != '"' {
                i += if chars[i] == '\\' { 2 } else { 1 };
            }
            (Piece::Quoted, (i + 1).min(chars.len()))
        }
        ('r', '"' | '#') if at == 0 || !is_name(chars[at - 1]) || chars[at - 1] == 'b' => {
            let hashes = chars[at + 1..].iter().take_while(|c| **c == '#').count();
            if next(1 + hashes) != '"' {
                return (Piece::Code, at + 1);
            }
            let closes =
                |i: usize| chars[i] == '"' && (1..=hashes).all(|n| chars.get(i + n) == Some(&'#'));
            (
                Piece::Quoted,
                (until(at + 2 + hashes, &closes) + 1 + hashes).min(chars.len()),
            )
        }
        ('\'', '\\') => (
            Piece::Quoted,
            (until(at + 3, &|i| chars[i] == '\'') + 1).min(chars.len()),
        ),
        // A character, not a lifetime.
        ('\'', _) if next(2) == '\'' => (Piece::Quoted, at + 3),
        _ => (Piece::Code, at + 1),
    }
}

/// True when the code before a place leaves an `impl Trait for Type {` open, innermost.
fn in_trait_impl(before: &str) -> bool {
    let mut depth = 0;
    for (at, c) in before.char_indices().rev() {
        depth += i32::from(c == '}') - i32::from(c == '{');
        if depth < 0 {
            let head = before[..at].rsplit([';', '{', '}']).next().unwrap_or("");
            return head.split_whitespace().any(|word| word.starts_with("impl"))
                && head.contains(" for ");
        }
    }
    false
}

/// The first names of the paths in `a::b`, or in `{a::b, c::{d, e}}`.
fn first_names(rest: &str) -> Vec<String> {
    let name = |text: &str| {
        text.trim_start()
            .chars()
            .take_while(|c| is_name(*c))
            .collect::<String>()
    };
    let Some(inside) = rest.strip_prefix('{') else {
        return vec![name(rest)];
    };
    let mut names = vec![name(inside)];
    let mut depth = 0;
    for (at, c) in inside.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => names.push(name(&inside[at + 1..])),
            _ => {}
        }
    }
    names.retain(|name| !name.is_empty());
    names
}

/// True when no name runs into position `at` from the left.
pub fn word_starts_at(text: &str, at: usize) -> bool {
    !text[..at].ends_with(is_name)
}

/// What follows each occurrence of `mark`.
pub fn after_each<'a>(text: &'a str, mark: &str) -> impl Iterator<Item = &'a str> {
    let length = mark.len();
    text.match_indices(mark)
        .map(move |(at, _)| &text[at + length..])
        .collect::<Vec<_>>()
        .into_iter()
}

fn is_name(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}
