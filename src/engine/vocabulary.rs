//! From a client's request to what the scheduler takes: tokens, sampler, stops. Done on any thread but the engine's.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::sync::Arc;

use super::request::{
    Generate, Prompt, SESSION_NAME_BYTES_MAX, STOP_BYTES_MAX, STOPS_MAX, Sampling, SessionName,
};
use crate::device::LIKELIEST;
use crate::error::{Error, Kind, Result};
use crate::model::forward::{Choices, Wanted};
use crate::text::{ChatTemplate, Message, Sampler, SamplerScratch, Stops, Tokenizer, Utf8Stream};

/// What turns texts into tokens for one model, and tokens into texts. Shared by all threads.
pub struct Vocabulary {
    model: Arc<str>,
    tokenizer: Option<(Arc<Tokenizer>, Arc<ChatTemplate>)>,
    /// Tokens that there are.
    tokens: usize,
    /// Positions of a session.
    context: usize,
    /// Bytes of the longest token.
    token_bytes_max: usize,
    /// Bytes that one token adds to an answer at most.
    text_bytes_max: usize,
}

/// Tokens of a prompt, as far as they are known.
#[derive(Debug, Clone, Copy)]
pub(super) enum Length {
    Exactly(usize),
    AtLeast(usize),
}

/// A request with all the memory that answering it takes.
pub struct Prepared {
    pub(super) model: Arc<str>,
    pub(super) session: Option<SessionName>,
    /// The tokens of the whole conversation, or of one that begins with this request.
    pub(super) whole: Vec<u32>,
    /// The tokens that follow what the session holds instead, if it holds something.
    pub(super) turn: Option<Vec<u32>>,
    pub(super) max_tokens: u32,
    pub(super) sampler: Sampler,
    /// The same, for tokens that are only likely to come.
    ahead: Sampler,
    pub(super) writer: Writer,
}

impl Prepared {
    /// What the sampler has to know of a row to choose the next token.
    pub(super) fn wanted(&self) -> Wanted {
        match self.sampler.looks_at() {
            Some(count) if count <= LIKELIEST => Wanted::Likeliest,
            _ => Wanted::Logits,
        }
    }

    /// Chooses the next token of the answer, and keeps in mind that it was said; none if the model has failed.
    pub(super) fn choose(
        &mut self,
        choices: Choices<'_>,
        scratch: &mut SamplerScratch,
    ) -> Option<u32> {
        choose(&mut self.sampler, choices, scratch)
    }

    /// What it would choose if a draft model's `choices` were its own, as the `index`-th draft in a row: with the random
    /// numbers that it is going to choose with, the same token is likelier than with others.
    pub(super) fn guess(
        &mut self,
        index: usize,
        choices: Choices<'_>,
        scratch: &mut SamplerScratch,
    ) -> Option<u32> {
        if index == 0 {
            self.ahead.follow(&self.sampler);
        }
        choose(&mut self.ahead, choices, scratch)
    }
}

/// Chooses a token, and keeps in mind that it was said; none if the model has failed.
fn choose(
    sampler: &mut Sampler,
    choices: Choices<'_>,
    scratch: &mut SamplerScratch,
) -> Option<u32> {
    let token = match choices {
        Choices::Logits(logits) => sampler.sample(logits, scratch),
        Choices::Likeliest(tokens) => {
            let tokens = tokens.iter().map(|token| (token.id, token.logit));
            sampler.sample_likeliest(tokens, scratch)
        }
    }?;
    sampler.accept(token);
    Some(token)
}

/// The error of a model whose logits are not finite: `model` is what its user calls it.
pub fn not_finite(model: impl std::fmt::Display) -> Error {
    Error::new(
        Kind::Format,
        format!("{model} says of its next token what is no number, or infinite"),
        "the file is damaged, or its weights are too large: fetch it again, and compare its SHA-256 with its publisher's",
    )
}

impl Vocabulary {
    /// The vocabulary of the model that clients call `model`; without a tokenizer prompts are tokens.
    pub fn new(
        model: &str,
        tokenizer: Option<(Arc<Tokenizer>, Arc<ChatTemplate>)>,
        tokens: usize,
        context: usize,
    ) -> Vocabulary {
        let longest = tokenizer.as_ref().map_or(0, |(tokenizer, _)| {
            let bytes = |id| tokenizer.token_bytes(id, true).len();
            (0..tokenizer.len() as u32).map(bytes).max().unwrap_or(0)
        });
        Vocabulary {
            model: model.into(),
            tokenizer,
            tokens,
            context,
            token_bytes_max: longest,
            // Each byte may turn out to be none of a character, and U+FFFD takes three; what was held back comes too.
            text_bytes_max: 3 * (longest + char::MAX.len_utf8()) + STOP_BYTES_MAX,
        }
    }

    /// The name of the model.
    pub fn model(&self) -> &str {
        &self.model
    }

    /// Whether it made this request ready.
    pub(super) fn made(&self, prepared: &Prepared) -> bool {
        Arc::ptr_eq(&self.model, &prepared.model)
    }

    /// Positions of a session.
    pub fn context(&self) -> usize {
        self.context
    }

    /// The tokenizer, if the model has one.
    pub fn tokenizer(&self) -> Option<&Arc<Tokenizer>> {
        self.tokenizer.as_ref().map(|(tokenizer, _)| tokenizer)
    }

    /// Makes a request ready for the scheduler.
    ///
    /// # Errors
    /// Something of it makes no sense, or its prompt alone is longer than a session may be. (Whether it fits behind what
    /// its session holds then, or fits as a whole where there is no such session, shows when it begins.)
    pub fn prepare(&self, request: &Generate) -> Result<Prepared> {
        check(request)?;
        let (whole, turn) = self.tokens(request)?;
        let shortest = turn
            .as_ref()
            .map_or(whole.len(), |turn| turn.len().min(whole.len()));
        if shortest == 0 {
            return Err(usage("the prompt has no tokens", "give a longer prompt"));
        }
        // Before what follows a conversation comes what that holds.
        self.check_fits(match turn {
            Some(_) => Length::AtLeast(shortest),
            None => Length::Exactly(shortest),
        })?;
        let mut all = whole.iter().chain(turn.iter().flatten());
        if let Some(token) = all.find(|&&token| token as usize >= self.tokens) {
            return Err(usage(
                format!("token {token} is not in the vocabulary of {}", self.tokens),
                "use the tokenizer of this model",
            ));
        }
        let session = request.session.as_deref().map(session_name).transpose()?;
        let sampler = sampler(&request.sampling)?;
        Ok(Prepared {
            model: Arc::clone(&self.model),
            session,
            whole,
            turn,
            max_tokens: request.max_tokens.unwrap_or(u32::MAX),
            ahead: sampler.another(),
            sampler,
            writer: Writer {
                tokenizer: self.tokenizer().cloned(),
                utf8: Utf8Stream::new(),
                stops: Stops::new(&request.stop),
                text: String::with_capacity(self.text_bytes_max),
            },
        })
    }

    /// Whether a prompt of so many tokens leaves room for an answer.
    pub(super) fn check_fits(&self, length: Length) -> Result<()> {
        let (tokens, or_more) = match length {
            Length::Exactly(tokens) => (tokens, ""),
            Length::AtLeast(tokens) => (tokens, " or more"),
        };
        if tokens < self.context {
            return Ok(());
        }
        Err(Error::new(
            Kind::Budget,
            format!(
                "the prompt has {tokens} tokens{or_more}, and a session of {} has {} with the answer",
                self.model, self.context
            ),
            format!(
                "send at most {} tokens, reset the session, or configure a larger context",
                self.context - 1
            ),
        ))
    }

    /// The tokens of a new conversation, and those that follow an old one.
    fn tokens(&self, request: &Generate) -> Result<(Vec<u32>, Option<Vec<u32>>)> {
        let (mut whole, mut turn) = (Vec::new(), Vec::new());
        // Cutting a text into tokens takes many times its length; what cannot fit is not begun with.
        let fewest = text_bytes(request).div_ceil(self.token_bytes_max.max(1));
        self.check_fits(Length::AtLeast(fewest))?;
        if let Prompt::Tokens(tokens) = &request.prompt {
            return Ok((tokens.clone(), None));
        }
        let Some((tokenizer, template)) = &self.tokenizer else {
            return Err(Error::new(
                Kind::Unsupported,
                format!("the model {} has no vocabulary", self.model),
                "send the prompt as tokens, or use a model file with a tokenizer",
            ));
        };
        match &request.prompt {
            Prompt::Raw(text) => {
                tokenizer.encode(text, tokenizer.add_bos_default(), true, &mut whole);
                tokenizer.encode_on(text, true, &mut turn);
            }
            Prompt::Text(text) => {
                let system = request
                    .system
                    .iter()
                    .map(|text| Message::new("system", text));
                let messages: Vec<Message> = system.chain([Message::new("user", text)]).collect();
                template.encode(tokenizer, &messages, true, &mut whole)?;
                if request.session.is_some() {
                    template.encode_turn(tokenizer, text, &mut turn)?;
                }
            }
            Prompt::Messages(messages) => {
                template.encode(tokenizer, messages, true, &mut whole)?;
                return Ok((whole, None));
            }
            Prompt::Tokens(_) => {}
        }
        Ok((whole, request.session.is_some().then_some(turn)))
    }
}

/// Bytes of the texts that are to become tokens.
fn text_bytes(request: &Generate) -> usize {
    match &request.prompt {
        Prompt::Text(text) | Prompt::Raw(text) => text.len(),
        Prompt::Messages(messages) => messages.iter().map(|m| m.content.len()).sum(),
        Prompt::Tokens(_) => 0,
    }
}

/// A session's name, as tables hold it.
fn session_name(name: &str) -> Result<SessionName> {
    let kept = SessionName::try_from(name).ok();
    kept.filter(|name| !name.is_empty()).ok_or_else(|| {
        usage(
            format!("the session's name has {} bytes", name.len()),
            format!("give a name of 1 to {SESSION_NAME_BYTES_MAX} bytes"),
        )
    })
}

/// What a request may not be, whatever the model.
fn check(request: &Generate) -> Result<()> {
    if request.system.is_some() && !matches!(request.prompt, Prompt::Text(_)) {
        return Err(usage(
            "the system's words go with a prompt of kind text only",
            "make them the first of the messages",
        ));
    }
    if request.max_tokens == Some(0) {
        return Err(usage("max_tokens is 0", "ask for at least one token"));
    }
    let too_long = request.stop.iter().find(|stop| stop.len() > STOP_BYTES_MAX);
    if request.stop.len() > STOPS_MAX || too_long.is_some() {
        return Err(usage(
            "there are too many stop strings, or one is too long",
            format!("give at most {STOPS_MAX} of at most {STOP_BYTES_MAX} bytes"),
        ));
    }
    Ok(())
}

/// The sampler, with a seed of its own where the request has none.
fn sampler(sampling: &Sampling) -> Result<Sampler> {
    // The standard library's hasher is seeded by the system.
    let seed = RandomState::new().build_hasher().finish();
    Ok(Sampler::new(sampling.options(seed)?))
}

/// Puts an answer's text together: whole characters, up to a stop string.
pub(super) struct Writer {
    tokenizer: Option<Arc<Tokenizer>>,
    utf8: Utf8Stream,
    stops: Stops,
    /// Text that is sure and was not told yet.
    pub(super) text: String,
}

impl Writer {
    /// Whether the token ends the answer by itself.
    pub(super) fn is_end(&self, token: u32) -> bool {
        self.tokenizer.as_ref().is_some_and(|t| t.is_eog(token))
    }

    /// Adds a token's text; whether a stop string is complete with it.
    pub(super) fn push(&mut self, token: u32) -> bool {
        let Some(tokenizer) = &self.tokenizer else {
            return false;
        };
        let (stops, text) = (&mut self.stops, &mut self.text);
        let mut stopped = false;
        self.utf8
            .push(tokenizer.token_bytes(token, false), |piece| {
                stopped = stopped || stops.push(piece, |sure| text.push_str(sure));
            });
        stopped
    }

    /// Adds what was held back; whether a stop string is complete with it.
    pub(super) fn finish(&mut self) -> bool {
        let (stops, text) = (&mut self.stops, &mut self.text);
        let mut stopped = false;
        self.utf8.finish(|piece| {
            stopped = stopped || stops.push(piece, |sure| text.push_str(sure));
        });
        if !stopped {
            stops.finish(|held| text.push_str(held));
        }
        stopped
    }
}

fn usage(what: impl Into<String>, remedy: impl Into<String>) -> Error {
    Error::new(Kind::Usage, what, remedy)
}
