//! What clients ask for and what they are told: one set of types for every framing.
//!
//! They go as JSON and as `postcard` alike, so enums are tagged by their name, every field is always written, and
//! only reading lets fields be left out (where the format has names for them). Texts of events are borrowed: telling
//! of a token allocates nothing.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};
use crate::text::{Message, SamplerOptions};

/// Bytes of a session's name at most.
pub const SESSION_NAME_BYTES_MAX: usize = 64;
/// A session's name, where tables hold it.
pub type SessionName = heapless::String<SESSION_NAME_BYTES_MAX>;
/// Stop strings of a request at most.
pub const STOPS_MAX: usize = 8;
/// Bytes of a stop string at most.
pub const STOP_BYTES_MAX: usize = 64;
/// Tokens whose logits a request may change at most.
pub const LOGIT_BIAS_MAX: usize = 1024;
/// Tokens back that penalties look at most.
pub const PENALTY_WINDOW_MAX: usize = 256;

/// Who asked, and for which of their requests: every event carries it back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Tag {
    /// The connection. The transports number them and never use a number again while its requests live.
    pub client: u32,
    /// The client's own number for the request, told apart from its others.
    pub request: u32,
}

/// What the model is to answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Prompt {
    /// The user's next turn, put into the model's chat template. In a session it follows what was said there.
    Text(String),
    /// Text that the model continues as it is. In a session it follows what the session holds.
    Raw(String),
    /// The whole conversation so far. What a session holds of it already is not computed again.
    Messages(Vec<Message>),
    /// The whole conversation so far, as tokens; the only kind for a model without a vocabulary.
    Tokens(Vec<u32>),
}

/// A request for an answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Generate {
    /// The model's name; the first of the configuration if none.
    #[serde(default)]
    pub model: Option<String>,
    /// The conversation's name. It is begun if there is none of this name, and kept after the answer. Without a name,
    /// each request is its own conversation.
    #[serde(default)]
    pub session: Option<String>,
    /// What to answer.
    pub prompt: Prompt,
    /// The system's words, where [`Prompt::Text`] begins a conversation.
    #[serde(default)]
    pub system: Option<String>,
    /// How tokens are chosen.
    #[serde(default)]
    pub sampling: Sampling,
    /// The answer ends before the first of these texts, which is not told.
    #[serde(default)]
    pub stop: Vec<String>,
    /// Tokens of the answer at most; if none, until the model ends it or the context is full.
    #[serde(default)]
    pub max_tokens: Option<u32>,
}

impl Generate {
    /// A request for `prompt` with everything else as usual.
    pub fn new(prompt: Prompt) -> Generate {
        Generate {
            model: None,
            session: None,
            prompt,
            system: None,
            sampling: Sampling::default(),
            stop: Vec::new(),
            max_tokens: None,
        }
    }
}

/// How tokens are chosen. What is left out is as llama.cpp's tools have it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sampling {
    /// Flattens (above 1) or sharpens the distribution; 0 always takes the likeliest token.
    pub temperature: f32,
    /// Only the likeliest `top_k` tokens are candidates; 0 for all.
    pub top_k: u32,
    /// Only the fewest tokens that are together at least this likely; 1 for all.
    pub top_p: f32,
    /// Only tokens at least this fraction as likely as the likeliest; 0 for all.
    pub min_p: f32,
    /// Divides the logit of a token that was said lately; 1 for none.
    pub repeat_penalty: f32,
    /// Taken from the logit for each time that a token was said lately.
    pub frequency_penalty: f32,
    /// Taken from the logit of a token that was said lately at all.
    pub presence_penalty: f32,
    /// How many tokens back is lately.
    pub penalty_window: u32,
    /// Added to the logits of these tokens: (token, bias).
    pub logit_bias: Vec<(u32, f32)>,
    /// The same seed chooses the same tokens; another one each time if none.
    pub seed: Option<u64>,
}

impl Default for Sampling {
    fn default() -> Self {
        let usual = SamplerOptions::default();
        Sampling {
            temperature: usual.temperature,
            top_k: usual.top_k as u32,
            top_p: usual.top_p,
            min_p: usual.min_p,
            repeat_penalty: usual.repeat_penalty,
            frequency_penalty: usual.frequency_penalty,
            presence_penalty: usual.presence_penalty,
            penalty_window: usual.penalty_window as u32,
            logit_bias: Vec::new(),
            seed: None,
        }
    }
}

impl Sampling {
    /// Always the likeliest token.
    pub fn greedy() -> Sampling {
        Sampling {
            temperature: 0.0,
            ..Sampling::default()
        }
    }

    /// The sampler's options; `seed` where the request names none.
    ///
    /// # Errors
    /// A value is not a number, or out of its range; the error names it.
    pub fn options(&self, seed: u64) -> Result<SamplerOptions> {
        let ranges = [
            ("temperature", self.temperature, 0.0, 100.0),
            ("top_p", self.top_p, 0.0, 1.0),
            ("min_p", self.min_p, 0.0, 1.0),
            ("repeat_penalty", self.repeat_penalty, 0.01, 100.0),
            ("frequency_penalty", self.frequency_penalty, -100.0, 100.0),
            ("presence_penalty", self.presence_penalty, -100.0, 100.0),
        ];
        for (name, value, least, most) in ranges {
            // Written so that NaN is refused too.
            if !(least..=most).contains(&value) {
                return Err(usage(
                    format!("{name} is {value}"),
                    format!("give a number from {least} to {most}"),
                ));
            }
        }
        if self.penalty_window as usize > PENALTY_WINDOW_MAX {
            return Err(usage(
                format!("penalty_window is {}", self.penalty_window),
                format!("give at most {PENALTY_WINDOW_MAX}"),
            ));
        }
        if self.logit_bias.len() > LOGIT_BIAS_MAX {
            return Err(usage(
                format!("logit_bias names {} tokens", self.logit_bias.len()),
                format!("name at most {LOGIT_BIAS_MAX}"),
            ));
        }
        if let Some((token, _)) = self.logit_bias.iter().find(|(_, bias)| bias.is_nan()) {
            return Err(usage(
                format!("the logit_bias of token {token} is not a number"),
                "give a number",
            ));
        }
        Ok(SamplerOptions {
            temperature: self.temperature,
            top_k: self.top_k as usize,
            top_p: self.top_p,
            min_p: self.min_p,
            repeat_penalty: self.repeat_penalty,
            frequency_penalty: self.frequency_penalty,
            presence_penalty: self.presence_penalty,
            penalty_window: self.penalty_window as usize,
            logit_bias: self.logit_bias.clone(),
            seed: self.seed.unwrap_or(seed),
        })
    }
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The model ended it.
    End,
    /// A stop string came.
    Stop,
    /// It has `max_tokens`.
    Length,
    /// The session's context is full, or there is no memory for it to grow and nothing idle to give up for it.
    Context,
    /// It was cancelled.
    Cancelled,
}

/// How many tokens a request took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Counts {
    /// Tokens before the answer: the prompt, and what its session held before it.
    pub prompt: u32,
    /// Of these, tokens whose keys and values were there already.
    pub cached: u32,
    /// Tokens of the answer, as many as there were token events.
    pub answer: u32,
}

/// Where a request's time went, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Timings {
    /// From its submission to its first row in a sweep.
    pub queued_ms: f32,
    /// From there to its first token.
    pub prefill_ms: f32,
    /// From there to its last token.
    pub decode_ms: f32,
}

/// What a client is told of its request. The first is `Accepted`, the last `Done` or `Error`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event<'a> {
    /// The request has its session and will be answered.
    Accepted {
        /// Tokens before the answer.
        prompt_tokens: u32,
        /// Of these, tokens that need not be computed.
        cached_tokens: u32,
    },
    /// A token was chosen, and this text is now sure to belong to the answer.
    ///
    /// All texts one after the other are the answer. They are whole characters, so the text may be empty, or be that
    /// of several tokens. The token that ends an answer has its event too.
    Token {
        /// Its place in the answer, from 0.
        index: u32,
        /// The token.
        id: u32,
        /// The text.
        #[serde(borrow)]
        text: Cow<'a, str>,
    },
    /// The answer is whole, or all there will be of it.
    Done {
        /// Why it ended.
        reason: Reason,
        /// How many tokens it took.
        counts: Counts,
        /// Where the time went.
        timings: Timings,
    },
    /// The request failed.
    Error {
        /// What kind of thing went wrong.
        code: Kind,
        /// What went wrong.
        #[serde(borrow)]
        text: Cow<'a, str>,
        /// What to do about it.
        #[serde(borrow)]
        remedy: Cow<'a, str>,
    },
}

impl Event<'_> {
    /// Whether no other event of the request follows.
    pub fn is_last(&self) -> bool {
        matches!(self, Event::Done { .. } | Event::Error { .. })
    }
}

impl<'a> From<&'a Error> for Event<'a> {
    fn from(error: &'a Error) -> Self {
        Event::Error {
            code: error.kind(),
            text: error.what().into(),
            remedy: error.remedy().into(),
        }
    }
}

fn usage(what: impl Into<String>, remedy: impl Into<String>) -> Error {
    Error::new(Kind::Usage, what, remedy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out_is_as_usual_and_what_is_unknown_is_refused() {
        let short: Generate = serde_json::from_str(r#"{"prompt":{"text":"Hi"}}"#).expect("JSON");
        assert_eq!(short, Generate::new(Prompt::Text("Hi".into())));
        let seeded: Sampling = serde_json::from_str(r#"{"seed":7,"top_k":1}"#).expect("JSON");
        assert_eq!((seeded.seed, seeded.top_k), (Some(7), 1));
        assert_eq!(seeded.temperature, Sampling::default().temperature);
        for wrong in [
            r#"{"prompt":{"text":"Hi"},"promt":1}"#,
            r#"{"prompt":{"txt":"Hi"}}"#,
            r#"{"prompt":{"messages":[{"role":"user","content":"Hi","name":"x"}]}}"#,
            r#"{"prompt":{"text":"Hi"},"sampling":{"temprature":0}}"#,
            r#"{"session":"a"}"#,
            r#"{"prompt":{"tokens":[-1]}}"#,
        ] {
            assert!(serde_json::from_str::<Generate>(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn both_formats_carry_everything() {
        let request = Generate {
            model: Some("small".into()),
            session: None,
            prompt: Prompt::Messages(vec![Message::new("user", "Where?")]),
            system: Some("Be brief.".into()),
            sampling: Sampling {
                logit_bias: vec![(3, -1.5)],
                ..Sampling::greedy()
            },
            stop: vec!["\n".into()],
            max_tokens: None,
        };
        let json = serde_json::to_string(&request).expect("JSON");
        assert_eq!(
            serde_json::from_str::<Generate>(&json).expect("its own"),
            request
        );
        let bytes = postcard::to_allocvec(&request).expect("postcard");
        assert_eq!(
            postcard::from_bytes::<Generate>(&bytes).expect("its own"),
            request
        );

        let error = usage("what", "do");
        let events = [
            Event::Accepted {
                prompt_tokens: 9,
                cached_tokens: 4,
            },
            Event::Token {
                index: 0,
                id: 17,
                text: "a \"word\"".into(),
            },
            Event::Done {
                reason: Reason::Length,
                counts: Counts::default(),
                timings: Timings::default(),
            },
            Event::from(&error),
        ];
        for event in &events {
            let json = serde_json::to_string(event).expect("JSON");
            assert_eq!(
                &serde_json::from_str::<Event>(&json).expect("its own"),
                event
            );
            let bytes = postcard::to_allocvec(event).expect("postcard");
            assert_eq!(
                &postcard::from_bytes::<Event>(&bytes).expect("its own"),
                event
            );
        }
        let json = serde_json::to_string(&events[1]).expect("JSON");
        assert_eq!(json, r#"{"token":{"index":0,"id":17,"text":"a \"word\""}}"#);
    }

    #[test]
    fn senseless_sampling_is_refused_by_name() {
        let refused = |sampling: Sampling| sampling.options(0).expect_err("refused").to_string();
        let wrong = |change: fn(&mut Sampling)| {
            let mut sampling = Sampling::default();
            change(&mut sampling);
            refused(sampling)
        };
        assert!(wrong(|s| s.temperature = f32::NAN).starts_with("temperature is NaN"));
        assert!(wrong(|s| s.top_p = 1.5).starts_with("top_p is 1.5"));
        assert!(wrong(|s| s.repeat_penalty = 0.0).starts_with("repeat_penalty"));
        assert!(wrong(|s| s.penalty_window = 1 << 20).starts_with("penalty_window"));
        assert!(wrong(|s| s.logit_bias = vec![(5, f32::NAN)]).contains("token 5"));
        assert_eq!(Sampling::default().options(9).expect("usual").seed, 9);
    }
}
