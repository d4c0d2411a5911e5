//! OpenAI's interface: its requests as ours, and our events as its replies.
//!
//! What a request asks for that airstream does not do is refused by name, unless ignoring it changes nothing that the
//! client could rely on.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Value, json};

use crate::engine::request::{Counts, Generate, Prompt, Reason, Sampling};
use crate::text::Message;

/// A request for a chat's next turn, or a text's continuation.
#[derive(Debug, Deserialize)]
pub struct Asked {
    model: Option<String>,
    messages: Option<Vec<AskedMessage>>,
    prompt: Option<OneOrMany>,
    /// Whether tokens are told as they come.
    #[serde(default)]
    pub stream: bool,
    stream_options: Option<StreamOptions>,
    max_tokens: Option<u32>,
    max_completion_tokens: Option<u32>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    stop: Option<OneOrMany>,
    seed: Option<i64>,
    frequency_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    logit_bias: Option<BTreeMap<String, f32>>,
    n: Option<u32>,
    best_of: Option<u32>,
    echo: Option<bool>,
    suffix: Option<String>,
    logprobs: Option<Value>,
    tools: Option<Vec<Value>>,
    functions: Option<Vec<Value>>,
    response_format: Option<ResponseFormat>,
    // Not OpenAI's, but usual among servers of open models.
    top_k: Option<u32>,
    min_p: Option<f32>,
    repeat_penalty: Option<f32>,
    /// The named conversation that the messages belong to: what it holds of them is not computed again.
    session: Option<String>,
}

#[derive(Debug, Deserialize)]
struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
}

#[derive(Debug, Deserialize)]
struct ResponseFormat {
    r#type: String,
}

#[derive(Debug, Deserialize)]
struct AskedMessage {
    role: String,
    content: Option<Content>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Debug, Deserialize)]
struct Part {
    r#type: String,
    text: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl OneOrMany {
    fn into_vec(self) -> Vec<String> {
        match self {
            OneOrMany::One(text) => vec![text],
            OneOrMany::Many(texts) => texts,
        }
    }
}

/// Which of the two interfaces was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interface {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Text,
}

/// Why a request cannot be answered.
#[derive(Debug, PartialEq, Eq)]
pub struct Refused {
    /// What is wrong.
    pub what: String,
    /// The parameter that is.
    pub param: Option<&'static str>,
}

fn refused(param: &'static str, what: impl Into<String>) -> Refused {
    Refused {
        what: what.into(),
        param: Some(param),
    }
}

impl Asked {
    /// Whether the last chunk of a stream tells the counts.
    pub fn wants_usage(&self) -> bool {
        self.stream_options
            .as_ref()
            .is_some_and(|options| options.include_usage)
    }

    /// The request in our words.
    ///
    /// # Errors
    /// It asks for what airstream does not do, or makes no sense.
    pub fn into_generate(self, interface: Interface) -> Result<Generate, Refused> {
        self.check()?;
        let prompt = match interface {
            Interface::Chat => {
                let messages = self.messages.ok_or_else(|| {
                    refused(
                        "messages",
                        "`messages` is missing: send what was said so far",
                    )
                })?;
                let messages: Result<Vec<Message>, Refused> =
                    messages.into_iter().map(message).collect();
                Prompt::Messages(messages?)
            }
            Interface::Text => {
                let prompt = self.prompt.ok_or_else(|| {
                    refused("prompt", "`prompt` is missing: send a text to continue")
                })?;
                let [text] = <[String; 1]>::try_from(prompt.into_vec()).map_err(|_| {
                    refused(
                        "prompt",
                        "`prompt` must be one text: send a request for each",
                    )
                })?;
                Prompt::Raw(text)
            }
        };
        let mut logit_bias = Vec::new();
        for (token, bias) in self.logit_bias.unwrap_or_default() {
            let token = token.parse().map_err(|_| {
                refused(
                    "logit_bias",
                    format!("`logit_bias`: {token:?} is no token number: give the model's own"),
                )
            })?;
            logit_bias.push((token, bias));
        }
        let usual = Sampling::default();
        let sampling = Sampling {
            temperature: self.temperature.unwrap_or(usual.temperature),
            top_k: self.top_k.unwrap_or(usual.top_k),
            top_p: self.top_p.unwrap_or(usual.top_p),
            min_p: self.min_p.unwrap_or(usual.min_p),
            repeat_penalty: self.repeat_penalty.unwrap_or(usual.repeat_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(0.0),
            presence_penalty: self.presence_penalty.unwrap_or(0.0),
            logit_bias,
            seed: self.seed.map(|seed| seed as u64),
            ..usual
        };
        Ok(Generate {
            model: self.model,
            session: self.session,
            sampling,
            stop: self.stop.map_or(Vec::new(), OneOrMany::into_vec),
            max_tokens: self.max_completion_tokens.or(self.max_tokens),
            ..Generate::new(prompt)
        })
    }

    fn check(&self) -> Result<(), Refused> {
        let no = |param: &'static str| {
            Err(refused(
                param,
                format!("`{param}` is not supported: leave it out"),
            ))
        };
        if self.n.is_some_and(|n| n != 1) || self.best_of.is_some_and(|n| n != 1) {
            return Err(refused(
                "n",
                "one choice a request is supported: send several requests",
            ));
        }
        if self.tools.as_ref().is_some_and(|tools| !tools.is_empty()) {
            return no("tools");
        }
        if self
            .functions
            .as_ref()
            .is_some_and(|functions| !functions.is_empty())
        {
            return no("functions");
        }
        if self
            .response_format
            .as_ref()
            .is_some_and(|format| format.r#type != "text")
        {
            return no("response_format");
        }
        if !matches!(self.logprobs, None | Some(Value::Null | Value::Bool(false))) {
            return no("logprobs");
        }
        if self.echo == Some(true) {
            return no("echo");
        }
        if self
            .suffix
            .as_ref()
            .is_some_and(|suffix| !suffix.is_empty())
        {
            return no("suffix");
        }
        Ok(())
    }
}

fn message(asked: AskedMessage) -> Result<Message, Refused> {
    let content = match asked.content {
        None => String::new(),
        Some(Content::Text(text)) => text,
        Some(Content::Parts(parts)) => {
            let mut content = String::new();
            for part in parts {
                match part {
                    Part {
                        r#type,
                        text: Some(text),
                    } if r#type == "text" => content.push_str(&text),
                    part => {
                        let what = format!(
                            "content of type {:?} is not supported: send text only",
                            part.r#type
                        );
                        return Err(refused("messages", what));
                    }
                }
            }
            content
        }
    };
    // OpenAI's newer name of the system's part.
    let role = if asked.role == "developer" {
        "system".into()
    } else {
        asked.role
    };
    Ok(Message { role, content })
}

/// What every reply to one request says of it.
#[derive(Debug, Clone)]
pub struct Head {
    /// Which interface was asked.
    pub interface: Interface,
    /// The reply's name.
    pub id: String,
    /// Seconds since 1970.
    pub created: u64,
    /// The model that answers.
    pub model: String,
}

/// OpenAI's word for the end of an answer.
pub fn finish_reason(reason: Reason) -> &'static str {
    match reason {
        Reason::End | Reason::Stop => "stop",
        Reason::Length | Reason::Context => "length",
        Reason::Cancelled => "cancelled",
    }
}

fn usage(counts: &Counts) -> Value {
    json!({
        "prompt_tokens": counts.prompt,
        "completion_tokens": counts.answer,
        "total_tokens": counts.prompt + counts.answer,
        "prompt_tokens_details": { "cached_tokens": counts.cached },
    })
}

impl Head {
    fn object(&self, streamed: bool) -> &'static str {
        match (self.interface, streamed) {
            (Interface::Chat, false) => "chat.completion",
            (Interface::Chat, true) => "chat.completion.chunk",
            (Interface::Text, _) => "text_completion",
        }
    }

    fn reply(&self, streamed: bool, choices: Value, counts: Option<&Counts>) -> Value {
        let mut reply = json!({
            "id": self.id,
            "object": self.object(streamed),
            "created": self.created,
            "model": self.model,
            "choices": choices,
        });
        if let Some(counts) = counts {
            reply["usage"] = usage(counts);
        }
        reply
    }

    /// The whole answer.
    pub fn whole(&self, text: &str, reason: Reason, counts: &Counts) -> Value {
        let finish = finish_reason(reason);
        let choice = match self.interface {
            Interface::Chat => json!({
                "index": 0,
                "message": { "role": "assistant", "content": text, "refusal": null },
                "logprobs": null,
                "finish_reason": finish,
            }),
            Interface::Text => {
                json!({ "index": 0, "text": text, "logprobs": null, "finish_reason": finish })
            }
        };
        self.reply(false, json!([choice]), Some(counts))
    }

    fn chunk(&self, delta: Value, text: &str, finish: Option<&str>) -> Value {
        let choice = match self.interface {
            Interface::Chat => {
                json!({ "index": 0, "delta": delta, "logprobs": null, "finish_reason": finish })
            }
            Interface::Text => {
                json!({ "index": 0, "text": text, "logprobs": null, "finish_reason": finish })
            }
        };
        self.reply(true, json!([choice]), None)
    }

    /// The first chunk of a chat's stream; a text's has none.
    pub fn first_chunk(&self) -> Option<Value> {
        (self.interface == Interface::Chat)
            .then(|| self.chunk(json!({ "role": "assistant", "content": "" }), "", None))
    }

    /// A piece of the answer.
    pub fn text_chunk(&self, text: &str) -> Value {
        self.chunk(json!({ "content": text }), text, None)
    }

    /// The chunk that ends the answer.
    pub fn last_chunk(&self, reason: Reason) -> Value {
        self.chunk(json!({}), "", Some(finish_reason(reason)))
    }

    /// The chunk after the last, for those who want the counts.
    pub fn usage_chunk(&self, counts: &Counts) -> Value {
        self.reply(true, json!([]), Some(counts))
    }
}

/// An error as OpenAI's clients read it.
pub fn error(what: &str, kind: &str, param: Option<&str>, code: Option<&str>) -> Value {
    json!({ "error": { "message": what, "type": kind, "param": param, "code": code } })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(json: Value) -> Asked {
        serde_json::from_value(json).expect("a request")
    }

    #[test]
    fn a_chat_becomes_a_request() {
        let chat = asked(json!({
            "model": "small",
            "messages": [
                { "role": "developer", "content": "Be brief." },
                { "role": "user", "content": [{ "type": "text", "text": "Hi" }, { "type": "text", "text": "!" }] },
            ],
            "max_tokens": 5, "max_completion_tokens": 7, "temperature": 0.5, "seed": -1,
            "stop": "\n", "logit_bias": { "50": -100 }, "user": "somebody", "stream": true,
            "stream_options": { "include_usage": true },
        }));
        assert!(chat.stream && chat.wants_usage());
        let generate = chat.into_generate(Interface::Chat).expect("sound");
        let messages = vec![
            Message::new("system", "Be brief."),
            Message::new("user", "Hi!"),
        ];
        assert_eq!(generate.prompt, Prompt::Messages(messages));
        assert_eq!(
            (generate.max_tokens, generate.stop),
            (Some(7), vec!["\n".to_owned()])
        );
        assert_eq!(generate.sampling.logit_bias, [(50, -100.0)]);
        assert_eq!(generate.sampling.seed, Some(u64::MAX));
    }

    #[test]
    fn what_cannot_be_done_is_refused_by_name() {
        let messages = json!([{ "role": "user", "content": "Hi" }]);
        for (param, value) in [
            ("n", json!(2)),
            ("tools", json!([{}])),
            ("logprobs", json!(true)),
            ("response_format", json!({ "type": "json_object" })),
            ("echo", json!(true)),
            ("logit_bias", json!({ "x": 1 })),
            (
                "messages",
                json!([{ "role": "user", "content": [{ "type": "image_url" }] }]),
            ),
            ("messages", Value::Null),
        ] {
            let mut request = json!({ "messages": messages });
            request[param] = value;
            let refused = asked(request)
                .into_generate(Interface::Chat)
                .expect_err(param);
            assert_eq!(refused.param, Some(param));
        }
        let many = asked(json!({ "prompt": ["a", "b"] })).into_generate(Interface::Text);
        assert_eq!(many.expect_err("two").param, Some("prompt"));
        let harmless =
            json!({ "messages": messages, "n": 1, "tools": [], "logprobs": false, "store": false });
        asked(harmless)
            .into_generate(Interface::Chat)
            .expect("nothing is asked for");
    }
}
