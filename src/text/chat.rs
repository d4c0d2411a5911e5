//! Chat templates: messages to the text that the model was trained to answer.

use super::chat_defaults;
use super::strftime::strftime;
use super::tokenizer::{Start, Tokenizer};
use crate::error::{Error, Kind, Result};
use crate::format::gguf::Gguf;
use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, ErrorKind, context};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::time::SystemTime;

/// Characters of which one is hidden in a text: Unicode promises that they are never a character.
const MARKERS: std::ops::RangeInclusive<char> = '\u{fdd0}'..='\u{fdef}';

/// Instructions that rendering may take: a long conversation takes some hundred thousand, and as many as this half a
/// second. A template comes with a model file, which may be anybody's; it shall not loop for ever. What it may not do is
/// bounded by this alone, so one that doubles a text again and again can still ask for more memory than there is.
const FUEL: u64 = 10_000_000;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// Who speaks: `system`, `user` or `assistant`.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// `role` says `content`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Message {
            role: role.into(),
            content: content.into(),
        }
    }
}

/// A model's chat template (Jinja).
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    bos: String,
    eos: String,
    /// The template has no place for a system message.
    folds_system: bool,
    /// Why nothing can be rendered with it.
    unusable: Option<Error>,
}

/// Bytes of a template's source at most; those in use have up to about 20 KiB.
const SOURCE_BYTES_MAX: usize = 256 << 10;

impl ChatTemplate {
    /// The template of the model file, or where it has none the usual one of the architecture.
    pub fn from_gguf(gguf: &Gguf, tokenizer: &Tokenizer) -> Result<Self> {
        let source = match gguf.str("tokenizer.chat_template")? {
            Some(source) => source,
            None => {
                let architecture = gguf.str("general.architecture")?.unwrap_or_default();
                chat_defaults::template(architecture, tokenizer)
            }
        };
        let text = |id: Option<u32>| {
            let bytes = id.map_or(&[][..], |id| tokenizer.token_bytes(id, true));
            String::from_utf8_lossy(bytes).into_owned()
        };
        Ok(Self::new(
            source,
            text(tokenizer.bos()),
            text(tokenizer.eos()),
        ))
    }

    /// A template from its source; `bos` and `eos` are the texts of the model's tokens.
    ///
    /// One that is no Jinja is kept: the model can still be given raw text, and rendering says what is wrong.
    pub fn new(source: &str, bos: impl Into<String>, eos: impl Into<String>) -> Self {
        let mut template = ChatTemplate {
            environment: environment(),
            source: without_generation_marks(source),
            bos: bos.into(),
            eos: eos.into(),
            folds_system: false,
            unusable: None,
        };
        let parsed = match source.len() {
            ..=SOURCE_BYTES_MAX => template.environment.template_from_str(&template.source),
            bytes => Err(minijinja::Error::new(
                ErrorKind::SyntaxError,
                format!("its source has {bytes} bytes, allowed are {SOURCE_BYTES_MAX}"),
            )),
        };
        template.unusable = parsed.map_err(|error| unusable(&error)).err();
        if let Some(error) = &template.unusable {
            log::warn!("{error}");
            return template;
        }
        // Some templates refuse a system message, others drop it: only trying it tells.
        let probe = [
            Message::new("system", "the system's words"),
            Message::new("user", "the user's words"),
        ];
        let rendered = template.render_as_is(&probe, true);
        template.folds_system =
            !rendered.is_ok_and(|text| text.contains(probe[0].content.as_str()));
        template
    }

    /// The text of a conversation; `add_generation_prompt` opens the assistant's next turn.
    ///
    /// Where the template has no place for a system message, it becomes the start of the
    /// first user message.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        if let Some(error) = &self.unusable {
            return Err(error.clone());
        }
        self.render_as_is(&self.folded(messages), add_generation_prompt)
            .map_err(|error| failed(&error))
    }

    /// Appends the tokens of a conversation to `out`, with one BOS if the model wants it.
    ///
    /// The template's control tokens are read as such; what looks like one in a message is text.
    pub fn encode(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        add_generation_prompt: bool,
        out: &mut Vec<u32>,
    ) -> Result<()> {
        let said = |c: char| messages.iter().any(|message| message.content.contains(c));
        let free = MARKERS.into_iter().find(|&marker| !said(marker));
        let marker = free.unwrap_or(*MARKERS.start());
        let broken: Vec<Message> = messages
            .iter()
            .map(|message| Message {
                role: tokenizer.break_controls(&message.role, marker),
                content: tokenizer.break_controls(&message.content, marker),
            })
            .collect();
        let text = self.render(&broken, add_generation_prompt)?;
        let has_bos = !self.bos.is_empty() && text.starts_with(&self.bos);
        let start = match tokenizer.add_bos_default() && !has_bos {
            true => Start::Bos,
            false => Start::New,
        };
        tokenizer.encode_parts(&text, start, true, Some(marker), out);
        Ok(())
    }

    /// Appends the tokens that take a conversation from the end of an answer to the beginning of the next one, when
    /// the user says `text` in between: the end of the assistant's turn, the user's turn, and the assistant's opening.
    ///
    /// # Errors
    /// The template does not put one turn after the other.
    pub fn encode_turn(&self, tokenizer: &Tokenizer, text: &str, out: &mut Vec<u32>) -> Result<()> {
        let mut free = MARKERS.filter(|&marker| !text.contains(marker));
        let (marker, answer) = match (free.next(), free.next()) {
            (Some(marker), Some(answer)) => (marker, answer),
            _ => (*MARKERS.start(), *MARKERS.end()),
        };
        // What a template puts around the answer does not depend on what is said in it, so it may be a mark that is
        // found again.
        let messages = [
            Message::new("user", "Hi"),
            Message::new("assistant", answer),
            Message::new("user", tokenizer.break_controls(text, marker)),
        ];
        let rendered = self.render(&messages, true)?;
        let Some((_, after)) = rendered.split_once(answer) else {
            return Err(Error::new(
                Kind::Unsupported,
                "the model's chat template does not show what was answered",
                "send the whole conversation as messages, or raw text",
            ));
        };
        tokenizer.encode_parts(after, Start::Within, true, Some(marker), out);
        Ok(())
    }

    fn folded<'a>(&self, messages: &'a [Message]) -> Cow<'a, [Message]> {
        if !self.folds_system || messages.iter().all(|message| message.role != "system") {
            return Cow::Borrowed(messages);
        }
        let mut system: Vec<&str> = Vec::new();
        let mut folded: Vec<Message> = Vec::new();
        for message in messages {
            match message.role.as_str() {
                "system" => system.push(&message.content),
                "user" if !system.is_empty() => {
                    system.push(&message.content);
                    folded.push(Message::new("user", system.join("\n\n")));
                    system.clear();
                }
                _ => folded.push(message.clone()),
            }
        }
        if !system.is_empty() {
            folded.push(Message::new("user", system.join("\n\n")));
        }
        Cow::Owned(folded)
    }

    fn render_as_is(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> std::result::Result<String, minijinja::Error> {
        let template = self.environment.template_from_str(&self.source)?;
        template.render(context! {
            messages,
            add_generation_prompt,
            bos_token => self.bos,
            eos_token => self.eos,
            tools => Value::from(()),
        })
    }
}

/// Jinja as Hugging Face's `transformers` sets it up for chat templates.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function(
        "raise_exception",
        |text: String| -> std::result::Result<String, _> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, text))
        },
    );
    environment.add_function("strftime_now", |format: &str| {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        strftime(format, since.map_or(0, |since| since.as_secs()))
    });
    environment.add_filter("tojson", to_json);
    environment
}

/// JSON as Python's `json.dumps` spaces it, not escaped for HTML.
fn to_json(value: Value, options: Kwargs) -> std::result::Result<String, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    let mut json = Vec::new();
    let written = match indent {
        Some(width) => {
            let indent = vec![b' '; width.min(16)];
            let pretty = serde_json::ser::PrettyFormatter::with_indent(&indent);
            value.serialize(&mut serde_json::Serializer::with_formatter(
                &mut json, pretty,
            ))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(
            &mut json, Spaced,
        )),
    };
    written.map_err(|error| {
        minijinja::Error::new(ErrorKind::InvalidOperation, "not JSON").with_source(error)
    })?;
    Ok(String::from_utf8(json).expect("serde_json writes UTF-8"))
}

/// One line with a space after each comma and colon.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first {
            Ok(())
        } else {
            writer.write_all(b", ")
        }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first {
            Ok(())
        } else {
            writer.write_all(b", ")
        }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
    ) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

/// The template without `{% generation %}` and its end, by which training marks what the assistant said: for the text
/// they mean nothing. A condition that holds has their place, because a tag also takes the spaces around it.
fn without_generation_marks(source: &str) -> String {
    let mut cleaned = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((before, tag)) = rest.split_once("{%") {
        let end = tag.find("%}").unwrap_or(tag.len());
        let word = tag[..end].trim_matches(|c: char| c == '-' || c.is_whitespace());
        let instead = match word {
            "generation" => "if true",
            "endgeneration" => "endif",
            _ => word,
        };
        cleaned.push_str(before);
        cleaned.push_str("{%");
        cleaned.push_str(&tag[..end].replacen(word, instead, 1));
        rest = &tag[end..];
    }
    cleaned.push_str(rest);
    cleaned
}

fn unusable(error: &minijinja::Error) -> Error {
    Error::new(
        Kind::Unsupported,
        format!("the model's chat template cannot be read: {error}"),
        "give whole prompts as raw text, or use a model file with another template",
    )
}

fn failed(error: &minijinja::Error) -> Error {
    Error::new(
        Kind::Unsupported,
        format!("the model's chat template fails: {error}"),
        "check that user and assistant messages take turns, or give the whole prompt as raw text",
    )
}

#[cfg(test)]
mod tests;
