//! Cutting text into words before byte-level BPE, as `tokenizer.ggml.pre` says.
//!
//! A pre-tokenizer is a list of stages; each cuts the pieces of the one before.
//! A stage is what its regular expression would match at the start of a text,
//! written as a function that answers the number of bytes matched, 0 for none;
//! what lies between two matches is a piece too. The expressions are those of
//! the models' own `tokenizer.json` files.

use crate::error::{Error, Kind, Result};
use unicode_general_category::{GeneralCategory as Category, get_general_category};

type Stage = fn(&str) -> usize;

/// How text is cut into words.
#[derive(Clone, Copy)]
pub(super) struct PreTokenizer {
    stages: &'static [Stage],
    /// A word that is a token as a whole is not built by merging.
    pub(super) whole_words: bool,
    /// Whether a text starts with BOS when the file does not say.
    pub(super) add_bos: bool,
}

impl PreTokenizer {
    /// The pre-tokenizer of that name.
    ///
    /// # Errors
    /// It is not known: text that is cut otherwise has other tokens than the model was trained on.
    pub(super) fn named(name: &str) -> Result<Self> {
        let (stages, whole_words, add_bos): (&'static [Stage], bool, bool) = match name {
            "gpt-2" | "gpt2" | "phi-2" | "mpt" | "olmo" | "jais" | "trillion" | "exaone4"
            | "mellum" | "gigachat" | "a.x-4.0" | "granite-docling" => (&[gpt2], false, false),
            "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone"
            | "minerva-7b" | "mellum2" => (&[one_digit, gpt2], false, false),
            "llama3" | "llama-v3" | "llama-bpe" | "falcon3" | "falcon-h1" | "pixtral"
            | "midm-2.0" | "lfm2" => (&[llama3], true, true),
            "dbrx" | "smaug-bpe" | "glm4" | "chatglm-bpe" => (&[llama3], false, false),
            "qwen2" | "deepseek-r1-qwen" | "megrez" | "kormo" | "stablelm2" | "hunyuan"
            | "solar-open" | "grok-2" | "f2llmv2" => (&[qwen2], false, false),
            "qwen35" => (&[qwen35], false, false),
            "tekken" => (&[tekken], true, true),
            "falcon" => (&[punctuation_or_backtick, gpt2, three_digits], false, false),
            "default" | "" => (&[punctuation, gpt2, digits, three_digits], false, false),
            unknown => {
                return Err(Error::new(
                    Kind::Unsupported,
                    format!(
                        "the tokenizer cuts text in a way of its own: tokenizer.ggml.pre is {unknown:?}"
                    ),
                    "use a model whose tokenizer cuts as that of GPT-2, SmolLM, Llama 3, Qwen 2, Mistral or Falcon does",
                ));
            }
        };
        Ok(PreTokenizer {
            stages,
            whole_words,
            add_bos,
        })
    }

    /// Calls `word` for the words of `text`, in order; together they are the text.
    pub(super) fn split(&self, text: &str, word: &mut dyn FnMut(&str)) {
        split(text, self.stages, word);
    }
}

fn split(text: &str, stages: &[Stage], word: &mut dyn FnMut(&str)) {
    let Some((stage, later)) = stages.split_first() else {
        return word(text);
    };
    let (mut gap, mut at) = (0, 0);
    while let Some(c) = text[at..].chars().next() {
        match stage(&text[at..]) {
            0 => at += c.len_utf8(),
            matched => {
                if gap < at {
                    split(&text[gap..at], later, word);
                }
                split(&text[at..at + matched], later, word);
                at += matched;
                gap = at;
            }
        }
    }
    if gap < at {
        split(&text[gap..at], later, word);
    }
}

/// `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`
fn gpt2(text: &str) -> usize {
    let contracted = contraction(text, false);
    if contracted > 0 {
        return contracted;
    }
    let body = text.strip_prefix(' ').unwrap_or(text);
    for class in [is_letter, is_number, is_other] {
        let matched = run(body, class);
        if matched > 0 {
            return text.len() - body.len() + matched;
        }
    }
    spaces(text)
}

/// `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`
fn llama3(text: &str) -> usize {
    lead_contraction_or(
        text,
        |text| lead_and_run(text, is_letter),
        3,
        is_other,
        &['\r', '\n'],
    )
}

/// As [`llama3`], but every digit is a word.
fn qwen2(text: &str) -> usize {
    lead_contraction_or(
        text,
        |text| lead_and_run(text, is_letter),
        1,
        is_other,
        &['\r', '\n'],
    )
}

/// As [`qwen2`], but marks belong to the letters.
fn qwen35(text: &str) -> usize {
    let letters = |text: &str| lead_and_run(text, |c| is_letter(c) || is_mark(c));
    lead_contraction_or(
        text,
        letters,
        1,
        |c| is_other(c) && !is_mark(c),
        &['\r', '\n'],
    )
}

/// Mistral's: words end where a capital follows a small letter, there are no contractions,
/// and every digit is a word. Letters outside of ASCII count as capital and small at once.
fn tekken(text: &str) -> usize {
    let words = |text: &str| {
        let lead = lead(text);
        [lead, 0]
            .into_iter()
            .map(|lead| (lead, cased_word(&text[lead..])))
            .find(|&(_, word)| word > 0)
            .map_or(0, |(lead, word)| lead + word)
    };
    words_digits_or(text, words, 1, is_other, &['\r', '\n', '/'])
}

/// `U*u+|U+u*` for capitals U and small letters u, 0 if neither matches.
fn cased_word(text: &str) -> usize {
    let capital = |c: char| is_letter(c) && !c.is_ascii_lowercase();
    let small = |c: char| is_letter(c) && !c.is_ascii_uppercase();
    let capitals = run(text, capital);
    let word = capitals + run(&text[capitals..], small);
    if word > capitals {
        return word;
    }
    // The last letter that is both must be the small one that the first expression ends in.
    let both = text[..capitals]
        .char_indices()
        .rev()
        .find(|&(_, c)| small(c));
    both.map_or(capitals, |(at, c)| at + c.len_utf8())
}

fn lead_contraction_or(
    text: &str,
    words: impl Fn(&str) -> usize,
    digits_max: usize,
    other: fn(char) -> bool,
    tail: &[char],
) -> usize {
    match contraction(text, true) {
        0 => words_digits_or(text, words, digits_max, other, tail),
        matched => matched,
    }
}

/// Words, then up to `digits_max` digits, then ` ?other+tail*`, then spaces that end in a newline, then spaces.
fn words_digits_or(
    text: &str,
    words: impl Fn(&str) -> usize,
    digits_max: usize,
    other: fn(char) -> bool,
    tail: &[char],
) -> usize {
    let word = words(text);
    if word > 0 {
        return word;
    }
    let digits: usize = text
        .chars()
        .take(digits_max)
        .take_while(|&c| is_number(c))
        .map(char::len_utf8)
        .sum();
    if digits > 0 {
        return digits;
    }
    let body = text.strip_prefix(' ').unwrap_or(text);
    let matched = run(body, other);
    if matched > 0 {
        let tail = run(&body[matched..], |c| tail.contains(&c));
        return text.len() - body.len() + matched + tail;
    }
    let blank = run(text, char::is_whitespace);
    match text[..blank].rfind(['\r', '\n']) {
        Some(newline) => newline + 1,
        None => spaces(text),
    }
}

/// `[^\r\n\p{L}\p{N}]?x+` for the class x of letters.
fn lead_and_run(text: &str, class: fn(char) -> bool) -> usize {
    let lead = lead(text);
    match run(&text[lead..], class) {
        0 => run(text, class),
        matched => lead + matched,
    }
}

/// `[^\r\n\p{L}\p{N}]?`
fn lead(text: &str) -> usize {
    let first = text
        .chars()
        .next()
        .filter(|&c| c != '\r' && c != '\n' && !is_letter(c) && !is_number(c));
    first.map_or(0, char::len_utf8)
}

/// `\s+(?!\S)|\s+`: the last space before a word belongs to the word.
fn spaces(text: &str) -> usize {
    let blank = run(text, char::is_whitespace);
    let last = text[..blank].chars().next_back().map_or(0, char::len_utf8);
    if blank < text.len() && blank > last {
        blank - last
    } else {
        blank
    }
}

fn contraction(text: &str, any_case: bool) -> usize {
    let matches = |suffix: &&str| {
        let found = text.as_bytes().get(1..1 + suffix.len()).unwrap_or_default();
        if any_case {
            found.eq_ignore_ascii_case(suffix.as_bytes())
        } else {
            found == suffix.as_bytes()
        }
    };
    if !text.starts_with('\'') {
        return 0;
    }
    let suffixes = ["s", "t", "m", "d", "re", "ve", "ll"];
    suffixes
        .into_iter()
        .find(matches)
        .map_or(0, |suffix| 1 + suffix.len())
}

fn one_digit(text: &str) -> usize {
    text.chars()
        .next()
        .filter(|&c| is_number(c))
        .map_or(0, char::len_utf8)
}

fn digits(text: &str) -> usize {
    run(text, is_number)
}

fn three_digits(text: &str) -> usize {
    let found = text.as_bytes().get(..3).unwrap_or_default();
    if found.iter().filter(|byte| byte.is_ascii_digit()).count() == 3 {
        3
    } else {
        0
    }
}

fn punctuation(text: &str) -> usize {
    run(text, |c| is_punctuation(c) || "$+<=>^~|".contains(c))
}

fn punctuation_or_backtick(text: &str) -> usize {
    run(text, |c| is_punctuation(c) || "$+<=>^~|`".contains(c))
}

/// Bytes of the characters of `class` that `text` starts with.
fn run(text: &str, class: impl Fn(char) -> bool) -> usize {
    text.find(|c| !class(c)).unwrap_or(text.len())
}

fn is_letter(c: char) -> bool {
    use Category::{
        LowercaseLetter, ModifierLetter, OtherLetter, TitlecaseLetter, UppercaseLetter,
    };
    if c.is_ascii() {
        return c.is_ascii_alphabetic();
    }
    matches!(
        get_general_category(c),
        LowercaseLetter | ModifierLetter | OtherLetter | TitlecaseLetter | UppercaseLetter
    )
}

fn is_number(c: char) -> bool {
    use Category::{DecimalNumber, LetterNumber, OtherNumber};
    if c.is_ascii() {
        return c.is_ascii_digit();
    }
    matches!(
        get_general_category(c),
        DecimalNumber | LetterNumber | OtherNumber
    )
}

fn is_mark(c: char) -> bool {
    use Category::{EnclosingMark, NonspacingMark, SpacingMark};
    matches!(
        get_general_category(c),
        EnclosingMark | NonspacingMark | SpacingMark
    )
}

fn is_punctuation(c: char) -> bool {
    use Category::{
        ClosePunctuation, ConnectorPunctuation, DashPunctuation, FinalPunctuation,
        InitialPunctuation, OpenPunctuation, OtherPunctuation,
    };
    matches!(
        get_general_category(c),
        ClosePunctuation
            | ConnectorPunctuation
            | DashPunctuation
            | FinalPunctuation
            | InitialPunctuation
            | OpenPunctuation
            | OtherPunctuation
    )
}

fn is_other(c: char) -> bool {
    !c.is_whitespace() && !is_letter(c) && !is_number(c)
}

#[cfg(test)]
mod tests {
    use super::PreTokenizer;

    fn words(name: &str, text: &str) -> Vec<String> {
        let mut words = Vec::new();
        let named = PreTokenizer::named(name).expect("a known one");
        named.split(text, &mut |word| words.push(word.to_owned()));
        words
    }

    #[test]
    fn an_unknown_one_is_an_error_that_names_it() {
        let error = PreTokenizer::named("of-tomorrow").err().expect("unknown");
        assert!(error.what().contains("of-tomorrow"), "{error}");
    }

    #[test]
    fn gpt2_keeps_one_space_with_the_word() {
        assert_eq!(
            words("gpt-2", "I'll  go\n\n 42!?\t"),
            ["I", "'ll", " ", " go", "\n\n", " 42", "!?", "\t"]
        );
        assert_eq!(words("gpt-2", "'S  "), ["'", "S", "  "]);
    }

    #[test]
    fn smollm_cuts_digits_before_spaces_are_shared_out() {
        assert_eq!(words("smollm", "a  12 b"), ["a", "  ", "1", "2", " b"]);
    }

    #[test]
    fn llama3_groups_digits_and_ends_lines() {
        assert_eq!(
            words("llama-bpe", "x='A';\n\n12345 it'S"),
            ["x", "='", "A", "';\n\n", "123", "45", " it", "'S"]
        );
        assert_eq!(
            words("qwen2", "  \n \n  x12"),
            ["  \n \n", " ", " x", "1", "2"]
        );
        assert_eq!(
            words("llama-bpe", "\t\tif (\u{e9}t\u{e9})"),
            ["\t", "\tif", " (", "\u{e9}t\u{e9}", ")"]
        );
    }

    #[test]
    fn marks_are_letters_for_qwen35_alone() {
        assert_eq!(words("qwen35", "e\u{301}a"), ["e\u{301}a"]);
        assert_eq!(words("qwen2", "e\u{301}a"), ["e", "\u{301}a"]);
    }

    #[test]
    fn tekken_splits_where_a_capital_follows() {
        assert_eq!(
            words("tekken", "camelCase HTTPServer ABC 12"),
            ["camel", "Case", " HTTPServer", " ABC", " ", "1", "2"]
        );
        assert_eq!(words("tekken", "A\u{c9}BC//\n"), ["A\u{c9}", "BC", "//\n"]);
    }

    #[test]
    fn default_isolates_punctuation_and_threes() {
        assert_eq!(
            words("default", "a, 12345!"),
            ["a", ",", " ", "123", "45", "!"]
        );
    }
}
