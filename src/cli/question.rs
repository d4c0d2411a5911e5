//! What `airstream run` and `airstream ask` have in common: the prompt, how it is to be answered, and what is said of
//! an answer that ended early.

use std::io::{self, IsTerminal, Read};

use clap::Args;

use crate::engine::request::{Generate, Prompt, Sampling};
use crate::error::{Error, Kind, Result};

/// The exit code after Ctrl-C, as of a process that the signal ended.
pub const INTERRUPTED: u8 = 130;

/// A prompt and how it is to be answered.
#[derive(Args)]
pub struct Question {
    /// Tokens to answer with at most. Default: until the model ends or the context is full.
    #[arg(short = 'n', long, value_name = "MAX")]
    max_tokens: Option<u32>,
    /// Temperature: 0 always takes the likeliest token.
    #[arg(long, value_name = "T", default_value_t = Sampling::default().temperature)]
    temp: f32,
    /// Sample from the K likeliest tokens; 0 for all.
    #[arg(long, value_name = "K", default_value_t = Sampling::default().top_k)]
    top_k: u32,
    /// Sample from the likeliest tokens that together have probability P.
    #[arg(long, value_name = "P", default_value_t = Sampling::default().top_p)]
    top_p: f32,
    /// Leave out tokens less likely than P times the likeliest.
    #[arg(long, value_name = "P", default_value_t = Sampling::default().min_p)]
    min_p: f32,
    /// Make tokens of the last 64 less likely by this factor; 1 does nothing.
    #[arg(long, value_name = "R", default_value_t = Sampling::default().repeat_penalty)]
    repeat_penalty: f32,
    /// Seed of the sampling: the same seed gives the same answer. Default: another one each time.
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// The system's part, where a conversation begins.
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    system: Option<String>,
    /// Continue the text as it is, without the model's chat template.
    #[arg(long)]
    raw: bool,
    /// The prompt.
    #[arg(value_name = "PROMPT")]
    prompt: Vec<String>,
}

impl Question {
    /// The words of the prompt, as they were given.
    pub fn words(&self) -> &[String] {
        &self.prompt
    }

    /// The prompt from the arguments or from a pipe; none on a terminal.
    pub fn text(&self) -> Result<Option<String>> {
        if !self.prompt.is_empty() {
            return Ok(Some(self.prompt.join(" ")));
        }
        if io::stdin().is_terminal() {
            return Ok(None);
        }
        let mut text = String::new();
        io::stdin().read_to_string(&mut text).map_err(|e| {
            Error::new(
                Kind::Usage,
                format!("cannot read the prompt: {e}"),
                "give UTF-8 text",
            )
        })?;
        match text.trim().is_empty() {
            true => Err(no_prompt()),
            false => Ok(Some(text)),
        }
    }

    /// A request for the answer to a prompt.
    pub fn request(&self, prompt: String) -> Generate {
        let prompt = match self.raw {
            true => Prompt::Raw(prompt),
            false => Prompt::Text(prompt),
        };
        Generate {
            system: self.system.clone(),
            sampling: Sampling {
                temperature: self.temp,
                top_k: self.top_k,
                top_p: self.top_p,
                min_p: self.min_p,
                repeat_penalty: self.repeat_penalty,
                seed: self.seed,
                ..Sampling::default()
            },
            max_tokens: self.max_tokens,
            ..Generate::new(prompt)
        }
    }
}

/// The error where a prompt is needed.
pub fn no_prompt() -> Error {
    Error::new(
        Kind::Usage,
        "there is no prompt",
        "give it as an argument or on stdin",
    )
}

/// Tells that an answer is not whole, and what would make the next one so.
pub fn tell_cut_short(remedy: &str) {
    log::warn!(
        "the answer is cut short: its context is full, or the memory that it would grow into; {remedy}"
    );
}
