//! HTTP/1.1 for those who speak OpenAI's interface, and for whoever watches the daemon.

mod answer;
mod metrics;
mod openai;
mod patient;

use std::convert::Infallible;
use std::rc::Rc;
use std::time::Duration;

use http_body_util::channel::Channel;
use http_body_util::{BodyExt, Either, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{AUTHORIZATION, CONNECTION, CONTENT_TYPE, HeaderValue, ORIGIN};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};

use self::openai::{Asked, Interface, error};
use self::patient::Patient;
use super::front::Front;
use super::unix::listen::Listening;

/// When no connection can be accepted (no descriptors), how long to let things be.
const PAUSE: Duration = Duration::from_millis(100);
/// A client that is slower than this to send a request's head is not a client.
const HEAD_PATIENCE: Duration = Duration::from_secs(10);

/// A body that is there at once, or comes as tokens do.
type Body = Either<Full<Bytes>, Channel<Bytes>>;

/// Where clients come from.
pub enum Listener {
    /// An address of the network.
    Tcp(TcpListener),
    /// A UNIX socket.
    Unix(Listening),
}

/// What a client must show.
#[derive(Clone, Default)]
pub struct Token(Option<Rc<str>>);

impl Token {
    /// This token, or none.
    pub fn new(token: Option<String>) -> Token {
        Token(token.map(Rc::from))
    }

    /// Whether the header shows it. Takes as long for a token that is nearly right as for any other of its length.
    fn is_shown(&self, header: Option<&HeaderValue>) -> bool {
        let Some(token) = &self.0 else { return true };
        let shown = header.map_or(&[][..], HeaderValue::as_bytes);
        let Some(shown) = shown.strip_prefix(b"Bearer ") else {
            return false;
        };
        let pairs = shown.iter().zip(token.as_bytes());
        shown.len() == token.len() && pairs.fold(0, |differing, (a, b)| differing | (a ^ b)) == 0
    }
}

/// Accepts connections until the daemon ends.
pub async fn serve(front: Rc<Front>, listener: Listener, token: Token) {
    let server = Rc::new(Server { front, token });
    let front = &server.front;
    match listener {
        Listener::Tcp(listener) => loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = front.stopped() => return,
            };
            match accepted {
                Ok((stream, address)) => {
                    // Tokens are small and somebody waits for each.
                    let _ = stream.set_nodelay(true);
                    connect(&server, stream, format!("http {address}"));
                }
                Err(e) => cannot_accept(&e).await,
            }
        },
        Listener::Unix(listening) => {
            let listener = match listening
                .socket
                .try_clone()
                .and_then(UnixListener::from_std)
            {
                Ok(listener) => listener,
                Err(e) => return log::error!("cannot wait for HTTP clients: {e}"),
            };
            loop {
                let accepted = tokio::select! {
                    accepted = listener.accept() => accepted,
                    () = front.stopped() => return,
                };
                match accepted {
                    Ok((stream, _)) => connect(&server, stream, "http".to_owned()),
                    Err(e) => cannot_accept(&e).await,
                }
            }
        }
    }
}

async fn cannot_accept(e: &std::io::Error) {
    log::warn!("cannot accept an HTTP client: {e}");
    tokio::time::sleep(PAUSE).await;
}

/// What the connections share.
struct Server {
    front: Rc<Front>,
    token: Token,
}

fn connect<S>(server: &Rc<Server>, stream: S, name: String)
where
    S: AsyncRead + AsyncWrite + Unpin + 'static,
{
    // A connection without a request is no client yet, but there may be no more of them either.
    if Rc::strong_count(server) > server.front.limits().clients {
        return log::warn!("{name}: refused, there are too many HTTP connections");
    }
    let server = Rc::clone(server);
    let stream = Patient::new(stream, server.front.limits().stalled());
    tokio::task::spawn_local(async move {
        let service = service_fn(|request| {
            let (front, name, token) =
                (Rc::clone(&server.front), name.clone(), server.token.clone());
            async move { Ok::<_, Infallible>(route(front, name, &token, request).await) }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_PATIENCE)
            .max_buf_size(64 << 10)
            .serve_connection(TokioIo::new(stream), service);
        if let Err(e) = connection.await {
            log::debug!("{name}: {e}");
        }
    });
}

async fn route(
    front: Rc<Front>,
    name: String,
    token: &Token,
    request: Request<Incoming>,
) -> Response<Body> {
    let path = request.uri().path().to_owned();
    if path != "/health" && !token.is_shown(request.headers().get(AUTHORIZATION)) {
        let what = "the token is missing or wrong: send `Authorization: Bearer TOKEN`";
        let what = error(what, "invalid_request_error", None, Some("invalid_api_key"));
        return last_reply(json_reply(StatusCode::UNAUTHORIZED, &what));
    }
    if token.0.is_none() && request.headers().contains_key(ORIGIN) {
        let what = "requests of web pages need a token: set `token_file` under [http]";
        let what = error(what, "invalid_request_error", None, None);
        return last_reply(json_reply(StatusCode::FORBIDDEN, &what));
    }
    let get = request.method() == Method::GET;
    let post = request.method() == Method::POST;
    match path.as_str() {
        "/health" if get => health(&front),
        "/metrics" if get => {
            let text = metrics::text(&front.status().await);
            reply(
                StatusCode::OK,
                "text/plain; version=0.0.4; charset=utf-8",
                text.into(),
            )
        }
        "/v1/models" if get => {
            let config = front.config();
            let data: Vec<Value> = config
                .models
                .iter()
                .map(|model| model_object(&model.as_ref().name))
                .collect();
            json_reply(StatusCode::OK, &json!({ "object": "list", "data": data }))
        }
        "/v1/chat/completions" if post => complete(front, name, request, Interface::Chat).await,
        "/v1/completions" if post => complete(front, name, request, Interface::Text).await,
        "/health" | "/metrics" | "/v1/models" | "/v1/chat/completions" | "/v1/completions" => {
            let what = format!("{} is not what {path} understands", request.method());
            json_reply(
                StatusCode::METHOD_NOT_ALLOWED,
                &error(&what, "invalid_request_error", None, None),
            )
        }
        _ => {
            if let Some(model) = path.strip_prefix("/v1/models/").filter(|_| get)
                && front.model(Some(model)).is_ok()
            {
                return json_reply(StatusCode::OK, &model_object(model));
            }
            let what = format!("there is no {path}");
            json_reply(
                StatusCode::NOT_FOUND,
                &error(&what, "invalid_request_error", None, None),
            )
        }
    }
}

fn health(front: &Front) -> Response<Body> {
    match front.worker().last_status().is_ready() {
        true => json_reply(StatusCode::OK, &json!({ "status": "ok" })),
        false => json_reply(
            StatusCode::SERVICE_UNAVAILABLE,
            &json!({ "status": "loading" }),
        ),
    }
}

fn model_object(name: &str) -> Value {
    json!({ "id": name, "object": "model", "created": 0, "owned_by": "airstream" })
}

async fn complete(
    front: Rc<Front>,
    name: String,
    request: Request<Incoming>,
    interface: Interface,
) -> Response<Body> {
    let limits = front.limits();
    let body = Limited::new(request.into_body(), limits.request_bytes.0 as usize);
    let asked = match tokio::time::timeout(limits.stalled(), body.collect()).await {
        Ok(Ok(body)) => serde_json::from_slice::<Asked>(&body.to_bytes()),
        Ok(Err(e)) if e.is::<http_body_util::LengthLimitError>() => {
            let what = format!("the request has more than {} bytes", limits.request_bytes.0);
            return json_reply(
                StatusCode::PAYLOAD_TOO_LARGE,
                &error(&what, "invalid_request_error", None, None),
            );
        }
        Ok(Err(e)) => {
            let what = format!("the request broke off: {e}");
            return json_reply(
                StatusCode::BAD_REQUEST,
                &error(&what, "invalid_request_error", None, None),
            );
        }
        Err(_) => {
            let what = "the request took too long to come";
            return json_reply(
                StatusCode::REQUEST_TIMEOUT,
                &error(what, "invalid_request_error", None, None),
            );
        }
    };
    match asked {
        Ok(asked) => answer::answer(front, name, asked, interface).await,
        Err(e) => {
            let what = format!("this is no request: {e}");
            json_reply(
                StatusCode::BAD_REQUEST,
                &error(&what, "invalid_request_error", None, None),
            )
        }
    }
}

fn json_reply(status: StatusCode, value: &Value) -> Response<Body> {
    reply(status, "application/json", value.to_string().into())
}

/// A reply after which the connection is closed: who may not ask need not hold it.
fn last_reply(mut reply: Response<Body>) -> Response<Body> {
    let close = HeaderValue::from_static("close");
    reply.headers_mut().insert(CONNECTION, close);
    reply
}

fn reply(status: StatusCode, content_type: &'static str, body: Bytes) -> Response<Body> {
    with_body(status, content_type, Either::Left(Full::new(body)))
}

fn with_body(status: StatusCode, content_type: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_must_be_shown_whole() {
        let token = Token::new(Some("secret".into()));
        let shown = |text: &'static str| token.is_shown(Some(&HeaderValue::from_static(text)));
        assert!(shown("Bearer secret"));
        assert!(
            !shown("Bearer secre")
                && !shown("Bearer secret2")
                && !shown("secret")
                && !shown("Bearer ")
        );
        assert!(!token.is_shown(None));
        assert!(Token::default().is_shown(None));
    }
}
