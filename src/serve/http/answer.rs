//! An answer over HTTP: whole, or as server-sent events while it is being made.

use std::rc::Rc;
use std::time::{Duration, UNIX_EPOCH};

use http_body_util::Either;
use http_body_util::channel::{Channel, Sender};
use hyper::body::Bytes;
use hyper::{Response, StatusCode};
use serde_json::Value;

use super::openai::{Asked, Head, Interface, Refused, error};
use super::{Body, json_reply, with_body};
use crate::engine::request::{Event, Generate};
use crate::error::Kind;
use crate::serve::front::{Client, Connected, Front};
use crate::serve::message::{Answer, Command, Request};
use crate::serve::outbox::Taken;

/// The one request of a client that HTTP makes.
const REQUEST: u32 = 1;
/// Events that wait for the connection, beyond those in the outbox.
const AHEAD: usize = 4;
/// How often a stream without tokens shows that it lives; so a client that went away is noticed too.
const COMMENT_EVERY: Duration = Duration::from_secs(2);

/// Answers a request.
pub(super) async fn answer(
    front: &Front,
    connected: Rc<Connected>,
    asked: Asked,
    interface: Interface,
) -> Response<Body> {
    let (stream, wants_usage) = (asked.stream, asked.wants_usage());
    let generate = match asked.into_generate(interface) {
        Ok(generate) => generate,
        Err(Refused { what, param }) => {
            return json_reply(
                StatusCode::BAD_REQUEST,
                &error(&what, "invalid_request_error", param, None),
            );
        }
    };
    let config = front.config();
    let Some(model) = config.model(generate.model.as_deref()) else {
        let name = generate.model.unwrap_or_default();
        let what = format!("there is no model {name:?}: /v1/models lists them");
        let body = error(
            &what,
            "invalid_request_error",
            Some("model"),
            Some("model_not_found"),
        );
        return json_reply(StatusCode::NOT_FOUND, &body);
    };
    let created = UNIX_EPOCH.elapsed().map_or(0, |t| t.as_secs());
    let client = Client::new(connected);
    let kind = if interface == Interface::Chat {
        "chatcmpl"
    } else {
        "cmpl"
    };
    let head = Head {
        interface,
        id: format!("{kind}-{created}-{}", client.number()),
        created,
        model: config.models[model].as_ref().name.clone(),
    };
    // Whether it can be answered at all shows before the status line goes out.
    let first = match begin(&client, generate).await {
        Ok(first) => first,
        Err((status, body)) => return json_reply(status, &body),
    };
    if !stream {
        return whole(client, head, first).await;
    }
    let (sender, channel) = Channel::new(AHEAD);
    let stalled = front.limits().stalled();
    tokio::task::spawn_local(async move {
        let mut events = Events { sender, stalled };
        // An error here is a client that went away, or reads nothing: dropping ours ends the answer.
        if events
            .stream(&client, &head, first, wants_usage)
            .await
            .is_none()
        {
            log::debug!("{}: gone before the end of its answer", client.name());
        }
    });
    with_body(StatusCode::OK, "text/event-stream", Either::Right(channel))
}

/// Submits the request; its first event, or why it is refused.
async fn begin(client: &Client, generate: Generate) -> Result<Taken, (StatusCode, Value)> {
    let command = Command::Generate(Box::new(generate));
    if let Some(Answer::Event(event)) = client
        .request(Request {
            id: REQUEST,
            command,
        })
        .await
    {
        return Err(failed(&event));
    }
    let first = next(client).await;
    match first.answer() {
        Answer::Event(event @ Event::Error { .. }) => Err(failed(&event)),
        _ => Ok(first),
    }
}

async fn next(client: &Client) -> Taken {
    loop {
        if let Some(taken) = client.take() {
            return taken;
        }
        client.filled().await;
    }
}

fn failed(event: &Event<'_>) -> (StatusCode, Value) {
    let Event::Error { code, text, remedy } = event else {
        return (
            StatusCode::INTERNAL_SERVER_ERROR,
            error("no reply", "server_error", None, None),
        );
    };
    let what = format!("{text}; remedy: {remedy}");
    match code {
        Kind::Usage | Kind::Unsupported => (
            StatusCode::BAD_REQUEST,
            error(&what, "invalid_request_error", None, None),
        ),
        Kind::Budget | Kind::Busy => (
            StatusCode::SERVICE_UNAVAILABLE,
            error(&what, "overloaded", None, None),
        ),
        Kind::Format | Kind::Io | Kind::Stalled => (
            StatusCode::INTERNAL_SERVER_ERROR,
            error(&what, "server_error", None, None),
        ),
    }
}

async fn whole(client: Client, head: Head, first: Taken) -> Response<Body> {
    let mut text = String::new();
    let mut taken = first;
    loop {
        match taken.answer() {
            Answer::Event(Event::Token { text: piece, .. }) => text.push_str(&piece),
            Answer::Event(Event::Done { reason, counts, .. }) => {
                return json_reply(StatusCode::OK, &head.whole(&text, reason, &counts));
            }
            Answer::Event(event @ Event::Error { .. }) => {
                let (status, body) = failed(&event);
                return json_reply(status, &body);
            }
            _ => {}
        }
        taken = next(&client).await;
    }
}

/// Server-sent events on their way out.
struct Events {
    sender: Sender<Bytes>,
    stalled: Duration,
}

impl Events {
    /// Streams the answer; none if the client is gone.
    async fn stream(
        &mut self,
        client: &Client,
        head: &Head,
        first: Taken,
        wants_usage: bool,
    ) -> Option<()> {
        if let Some(chunk) = head.first_chunk() {
            self.event(&chunk).await?;
        }
        let mut taken = first;
        loop {
            match taken.answer() {
                Answer::Event(Event::Token { text, .. }) if !text.is_empty() => {
                    self.event(&head.text_chunk(&text)).await?;
                }
                Answer::Event(Event::Done { reason, counts, .. }) => {
                    self.event(&head.last_chunk(reason)).await?;
                    if wants_usage {
                        self.event(&head.usage_chunk(&counts)).await?;
                    }
                    return self.send("data: [DONE]\n\n".into()).await;
                }
                Answer::Event(event @ Event::Error { .. }) => {
                    self.event(&failed(&event).1).await?;
                    return self.send("data: [DONE]\n\n".into()).await;
                }
                _ => {}
            }
            taken = loop {
                tokio::select! {
                    taken = next(client) => break taken,
                    () = tokio::time::sleep(COMMENT_EVERY) => self.send(": still there\n\n".into()).await?,
                }
            };
        }
    }

    async fn event(&mut self, value: &Value) -> Option<()> {
        self.send(format!("data: {value}\n\n").into()).await
    }

    async fn send(&mut self, bytes: Bytes) -> Option<()> {
        let sent = tokio::time::timeout(self.stalled, self.sender.send_data(bytes)).await;
        sent.ok()?.ok()
    }
}
