//! What clients and the daemon say to each other: one set of types for every framing.
//!
//! As JSON, on a UNIX socket, a request is one line with its number and one command, and so is a reply:
//!
//! ```text
//! {"id":1,"generate":{"prompt":{"text":"Why is the sky blue?"},"max_tokens":20}}
//! {"id":1,"accepted":{"prompt_tokens":36,"cached_tokens":0}}
//! {"id":1,"token":{"index":0,"id":504,"text":"The"}}
//! {"id":1,"done":{"reason":"length","counts":{"prompt":36,"cached":0,"answer":20},"timings":{...}}}
//! ```
//!
//! As `postcard`, on a serial line, a request is the number and then the command, and so is a reply. Every request is
//! answered by any number of events, of which exactly one, the last, is `done`, `ok`, `status` or `error`.

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, Visitor};
use serde::ser::Serializer;
use serde::{Deserialize, Serialize};

use super::status::Status;
use crate::engine::request::{Event, Generate};
use crate::error::Error;

/// A request.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The client's number for it. Of requests that are answered at the same time each has its own.
    pub id: u32,
    /// What to do.
    pub command: Command,
}

/// What a client can ask for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Command {
    /// Answer a prompt.
    Generate(Box<Generate>),
    /// End one of this client's answers.
    Cancel(Cancel),
    /// Forget a conversation.
    Reset(Reset),
    /// Load a model of the configuration.
    Load(ModelName),
    /// Give the memory of a model back.
    Unload(ModelName),
    /// Tell how things are.
    Status(Nothing),
    /// Change the memory budget.
    SetBudget(Budget),
}

/// Which answer to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cancel {
    /// The number of its request.
    pub request: u32,
}

/// Which conversation to forget.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reset {
    /// Its name.
    pub session: String,
    /// Its model; the first of the configuration if none.
    #[serde(default)]
    pub model: Option<String>,
}

/// Which model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelName {
    /// Its name in the configuration.
    pub model: String,
}

/// How much memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Budget {
    /// Bytes of the budget.
    pub bytes: u64,
}

/// No more to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nothing {}

/// A reply.
#[derive(Debug, Clone, PartialEq)]
pub struct Reply<'a> {
    /// The number of the request; 0 where it could not be read.
    pub id: u32,
    /// What there is to say.
    pub answer: Answer<'a>,
}

/// A reply that is only borrowed, to be written.
#[derive(Debug, Clone, Copy)]
pub struct Said<'a> {
    /// The number of the request; 0 where it could not be read.
    pub id: u32,
    /// What there is to say.
    pub answer: &'a Answer<'a>,
}

/// What the daemon answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer<'a> {
    /// What became of an answer, or of any request that failed.
    #[serde(borrow)]
    Event(Event<'a>),
    /// It is done.
    Ok(Nothing),
    /// How things are.
    Status(Box<Status>),
}

impl<'a> From<&'a Error> for Answer<'a> {
    fn from(error: &'a Error) -> Self {
        Answer::Event(error.into())
    }
}

impl Answer<'_> {
    /// Whether no other reply to the request follows.
    pub fn is_last(&self) -> bool {
        match self {
            Answer::Event(event) => event.is_last(),
            Answer::Ok(_) | Answer::Status(_) => true,
        }
    }
}

/// The form in JSON: the number beside the one thing that is said.
#[derive(Serialize)]
struct Line<'a, T> {
    id: u32,
    #[serde(flatten)]
    said: &'a T,
}

impl Serialize for Request {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let (id, said) = (self.id, &self.command);
        match serializer.is_human_readable() {
            true => Line { id, said }.serialize(serializer),
            false => (id, said).serialize(serializer),
        }
    }
}

impl Serialize for Reply<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Reply { id, answer } = self;
        Said { id: *id, answer }.serialize(serializer)
    }
}

impl Serialize for Said<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let id = self.id;
        match (self.answer, serializer.is_human_readable()) {
            (answer, false) => (id, answer).serialize(serializer),
            (Answer::Event(said), true) => Line { id, said }.serialize(serializer),
            (said, true) => Line { id, said }.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Request {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            return deserializer.deserialize_map(RequestVisitor);
        }
        let (id, command) = Deserialize::deserialize(deserializer)?;
        Ok(Request { id, command })
    }
}

/// Reads a request in JSON, strictly: a misspelt command must not become another one's default.
struct RequestVisitor;

const COMMANDS: &[&str] = &[
    "generate",
    "cancel",
    "reset",
    "load",
    "unload",
    "status",
    "set_budget",
];

impl<'de> Visitor<'de> for RequestVisitor {
    type Value = Request;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object with a request's id and its command")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Request, A::Error> {
        let (mut id, mut command) = (None, None);
        while let Some(key) = map.next_key::<std::borrow::Cow<'_, str>>()? {
            if key == "id" {
                id = Some(map.next_value()?);
            } else if command.is_some() {
                return Err(A::Error::custom(format_args!(
                    "`{key}` beside another command"
                )));
            } else {
                command = Some(map.next_value_seed(CommandSeed(&key))?);
            }
        }
        Ok(Request {
            id: id.ok_or_else(|| A::Error::missing_field("id"))?,
            command: command.ok_or_else(|| A::Error::custom("no command beside the id"))?,
        })
    }
}

struct CommandSeed<'k>(&'k str);

impl<'de> DeserializeSeed<'de> for CommandSeed<'_> {
    type Value = Command;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Command, D::Error> {
        Ok(match self.0 {
            "generate" => Command::Generate(Deserialize::deserialize(from)?),
            "cancel" => Command::Cancel(Deserialize::deserialize(from)?),
            "reset" => Command::Reset(Deserialize::deserialize(from)?),
            "load" => Command::Load(Deserialize::deserialize(from)?),
            "unload" => Command::Unload(Deserialize::deserialize(from)?),
            "status" => Command::Status(Deserialize::deserialize(from)?),
            "set_budget" => Command::SetBudget(Deserialize::deserialize(from)?),
            other => return Err(D::Error::unknown_field(other, COMMANDS)),
        })
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Reply<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if !deserializer.is_human_readable() {
            let (id, answer) = Deserialize::deserialize(deserializer)?;
            return Ok(Reply { id, answer });
        }
        #[derive(Deserialize)]
        struct Line<'a> {
            id: u32,
            #[serde(flatten, borrow)]
            said: Either<'a>,
        }
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either<'a> {
            #[serde(borrow)]
            Event(Event<'a>),
            #[serde(borrow)]
            Other(Answer<'a>),
        }
        let Line { id, said } = Deserialize::deserialize(deserializer)?;
        let answer = match said {
            Either::Event(event) => Answer::Event(event),
            Either::Other(answer) => answer,
        };
        Ok(Reply { id, answer })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::request::{Counts, Prompt, Reason, Timings};
    use crate::error::Kind;

    fn commands() -> Vec<Command> {
        let model = || ModelName {
            model: "small".into(),
        };
        vec![
            Command::Generate(Box::new(Generate::new(Prompt::Text("Hi".into())))),
            Command::Cancel(Cancel { request: 3 }),
            Command::Reset(Reset {
                session: "arm".into(),
                model: None,
            }),
            Command::Load(model()),
            Command::Unload(model()),
            Command::Status(Nothing {}),
            Command::SetBudget(Budget { bytes: 2 << 30 }),
        ]
    }

    #[test]
    fn requests_survive_both_formats() {
        for (command, name) in commands().into_iter().zip(COMMANDS) {
            let request = Request { id: 9, command };
            let json = serde_json::to_string(&request).expect("JSON");
            assert!(
                json.starts_with(&format!("{{\"id\":9,\"{name}\":{{")),
                "{json}"
            );
            assert_eq!(
                serde_json::from_str::<Request>(&json).expect("its own"),
                request
            );
            let bytes = postcard::to_allocvec(&request).expect("postcard");
            assert_eq!(
                postcard::from_bytes::<Request>(&bytes).expect("its own"),
                request
            );
        }
    }

    #[test]
    fn replies_survive_both_formats() {
        let error = Error::new(Kind::Usage, "what", "do");
        let answers = [
            Answer::Event(Event::Accepted {
                prompt_tokens: 3,
                cached_tokens: 1,
            }),
            Answer::Event(Event::Token {
                index: 0,
                id: 17,
                text: "a \"word\"\n".into(),
            }),
            Answer::Event(Event::Done {
                reason: Reason::End,
                counts: Counts::default(),
                timings: Timings {
                    queued_ms: 0.25,
                    ..Timings::default()
                },
            }),
            Answer::from(&error),
            Answer::Ok(Nothing {}),
            Answer::Status(Box::default()),
        ];
        for answer in answers {
            let reply = Reply { id: 4, answer };
            let json = serde_json::to_string(&reply).expect("JSON");
            assert!(json.starts_with("{\"id\":4,\""), "{json}");
            assert!(!json.contains("\"event\""), "{json}");
            assert_eq!(
                serde_json::from_str::<Reply>(&json).expect("its own"),
                reply
            );
            let bytes = postcard::to_allocvec(&reply).expect("postcard");
            assert_eq!(
                postcard::from_bytes::<Reply>(&bytes).expect("its own"),
                reply
            );
        }
    }

    #[test]
    fn what_is_no_request_is_told_why() {
        for (text, why) in [
            ("{}", "missing field `id`"),
            (r#"{"id":1}"#, "no command"),
            (
                r#"{"id":1,"genrate":{}}"#,
                "unknown field `genrate`, expected one of `generate`",
            ),
            (
                r#"{"id":1,"status":{},"reset":{"session":"a"}}"#,
                "`reset` beside another command",
            ),
            (r#"{"id":-1,"status":{}}"#, "expected u32"),
            (r#"{"id":1e300,"status":{}}"#, "expected u32"),
            (r#"{"id":1,"status":{"of":"it"}}"#, "unknown field `of`"),
            (r#"[1,{"status":{}}]"#, "expected an object"),
            (
                r#"{"id":1,"generate":{"prompt":{"text":"x"},"max_tokens":99999999999}}"#,
                "expected u32",
            ),
            ("\"status\"", "expected an object"),
        ] {
            let error = serde_json::from_str::<Request>(text)
                .expect_err(text)
                .to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
        let deep = format!("{{\"id\":1,\"generate\":{}", "[".repeat(100_000));
        assert!(serde_json::from_str::<Request>(&deep).is_err());
    }
}
