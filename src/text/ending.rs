//! Tokens that GGUF files describe by their text alone: those that end generation,
//! and those whose declared kind is known to be wrong. The lists are llama.cpp's.

use super::vocab::TokenKind;

/// Texts of tokens after which generation ends.
const ENDS: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
    // Ends of a file in fill-in-the-middle training.
    "<|fim_pad|>",
    "<fim-pad>",
    "<fim_pad>",
    "<PAD>",
    "[PAD]",
    "<|fim_repo|>",
    "<|repo_name|>",
    "<fim-repo>",
    "<REPO>",
    "<reponame>",
    "<|file_sep|>",
];

/// Texts of other control tokens that files may declare as text.
const CONTROLS: &[&str] = &[
    "<|fim_prefix|>",
    "<fim-prefix>",
    "<fim_prefix>",
    "<PRE>",
    "\u{2581}<PRE>",
    "<|fim_suffix|>",
    "<fim-suffix>",
    "<fim_suffix>",
    "<SUF>",
    "\u{2581}<SUF>",
    "<|fim_middle|>",
    "<fim-middle>",
    "<fim_middle>",
    "<MID>",
    "\u{2581}<MID>",
];

/// Whether generation ends after a token with this text.
pub(super) fn ends_generation(text: &[u8]) -> bool {
    ENDS.iter().any(|end| end.as_bytes() == text)
}

/// The kind of a token that the file declares as `declared`.
pub(super) fn kind(text: &[u8], declared: TokenKind) -> TokenKind {
    let is = |known: &&str| known.as_bytes() == text;
    if ENDS.iter().chain(CONTROLS).any(is) {
        return TokenKind::Control;
    }
    // Parts of gpt-oss's answer, which a reader must see.
    if ["<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"]
        .iter()
        .any(is)
    {
        return TokenKind::UserDefined;
    }
    declared
}

/// Takes out of `eog` what only looks like an end: `<|end|>` where `<|return|>` and
/// `<|call|>` are the ends, and `</s>` where turns end otherwise.
pub(super) fn drop_false_ends<'a>(eog: &mut Vec<u32>, bytes: impl Fn(u32) -> &'a [u8]) {
    let has = |text: &str| eog.iter().any(|&id| bytes(id) == text.as_bytes());
    let call = has("<|call|>") || has("<|calls|>");
    let end_is_inner = call && (has("<|return|>") || has("<|flush|>"));
    let s_is_text = has("<|tool_response>");
    eog.retain(|&id| {
        !(end_is_inner && bytes(id) == b"<|end|>" || s_is_text && bytes(id) == b"</s>")
    });
}
