//! HTTP/1.1 for those who speak OpenAI's interface, and for whoever watches the daemon.

mod answer;
mod metrics;
mod openai;
mod patient;

use std::cell::RefCell;
use std::convert::Infallible;
use std::rc::Rc;
use std::time::Duration;

use http_body_util::channel::Channel;
use http_body_util::{BodyExt, Either, Full};
use hyper::body::{Bytes, Incoming};
use hyper::header::{AUTHORIZATION, CONNECTION, CONTENT_TYPE, HeaderValue, ORIGIN};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;

use self::openai::{Asked, Interface, error};
use self::patient::Patient;
use super::accept::accept;
use super::front::{Connected, Front};
use super::lines::make_room;
use super::unix::listen::Listening;
use crate::error::Error;

/// What a connection holds each way: the head of a request, and what is written of a reply.
const BUFFER_BYTES: usize = 16 << 10;
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

/// What a client must show. Clones are one and the same.
#[derive(Clone, Default)]
pub struct Token(Rc<RefCell<Option<String>>>);

impl Token {
    /// This token, or none.
    pub fn new(token: Option<String>) -> Token {
        Token(Rc::new(RefCell::new(token)))
    }

    /// Has clients show what they must show for `other` from now on.
    pub fn become_like(&self, other: &Token) {
        let token = other.0.borrow().clone();
        self.0.replace(token);
    }

    /// Whether clients need to show nothing.
    fn is_none(&self) -> bool {
        self.0.borrow().is_none()
    }

    /// Whether the header shows it. Takes as long for a token that is nearly right as for any other of its length.
    fn is_shown(&self, header: Option<&HeaderValue>) -> bool {
        let token = self.0.borrow();
        let Some(token) = token.as_ref() else {
            return true;
        };
        let shown = header.map_or(&[][..], HeaderValue::as_bytes);
        // The scheme is written in any case (RFC 9110), the token in its own.
        let Some((scheme, shown)) = shown.split_at_checked(b"Bearer ".len()) else {
            return false;
        };
        if !scheme.eq_ignore_ascii_case(b"Bearer ") {
            return false;
        }
        let pairs = shown.iter().zip(token.as_bytes());
        shown.len() == token.len() && pairs.fold(0, |differing, (a, b)| differing | (a ^ b)) == 0
    }
}

/// Accepts connections until the daemon ends.
pub async fn serve(front: Rc<Front>, listener: Listener, token: Token) {
    let server = Rc::new(Server { front, token });
    let front = &server.front;
    match listener {
        Listener::Tcp(listener) => {
            let next = async || listener.accept().await;
            accept(front, next, |(stream, address)| {
                // Tokens are small and somebody waits for each.
                let _ = stream.set_nodelay(true);
                connect(&server, stream, format!("http {address}"));
            })
            .await;
        }
        Listener::Unix(listening) => {
            let listener = match listening.listener() {
                Ok(listener) => listener,
                Err(e) => return log::error!("cannot wait for HTTP clients: {e}"),
            };
            let next = async || listener.accept().await;
            accept(front, next, |(stream, _)| {
                connect(&server, stream, "http".to_owned());
            })
            .await;
        }
    }
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
    let front = &server.front;
    // Connections come and go with requests, so the log need not tell of each.
    let connected = match front.connect(name, log::Level::Debug) {
        Ok(connected) => connected,
        Err(e) => {
            tokio::task::spawn_local(turn_away(stream, e));
            return;
        }
    };
    let stream = Patient::new(stream, front.limits().stalled());
    let server = Rc::clone(server);
    tokio::task::spawn_local(async move {
        let service = service_fn(|request| {
            let (server, connected) = (Rc::clone(&server), Rc::clone(&connected));
            async move { Ok::<_, Infallible>(route(&server, connected, request).await) }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_PATIENCE)
            .max_buf_size(BUFFER_BYTES)
            .serve_connection(TokioIo::new(stream), service);
        if let Err(e) = connection.await {
            log::debug!("{}: {e}", connected.name());
        }
    });
}

/// Tells a connection that there are too many, whatever it wants.
async fn turn_away(mut stream: impl AsyncWrite + Unpin, why: Error) {
    let body = error(&why.to_string(), "overloaded", None, None).to_string();
    let length = body.len();
    let reply = format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\nconnection: close\r\n\r\n{body}"
    );
    // So little fits into the buffers of any connection that is still there.
    let _ = stream.write_all(reply.as_bytes()).await;
    let _ = stream.shutdown().await;
}

async fn route(
    server: &Server,
    connected: Rc<Connected>,
    request: Request<Incoming>,
) -> Response<Body> {
    let Server { front, token } = server;
    let path = request.uri().path().to_owned();
    if path != "/health" && !token.is_shown(request.headers().get(AUTHORIZATION)) {
        let what = "the token is missing or wrong: send `Authorization: Bearer TOKEN`";
        let what = error(what, "invalid_request_error", None, Some("invalid_api_key"));
        return last_reply(json_reply(StatusCode::UNAUTHORIZED, &what));
    }
    if token.is_none() && request.headers().contains_key(ORIGIN) {
        let what = "requests of web pages need a token: set `token_file` under [http]";
        let what = error(what, "invalid_request_error", None, None);
        return last_reply(json_reply(StatusCode::FORBIDDEN, &what));
    }
    let get = request.method() == Method::GET;
    let post = request.method() == Method::POST;
    match path.as_str() {
        "/health" if get => health(front),
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
        "/v1/chat/completions" if post => {
            complete(front, connected, request, Interface::Chat).await
        }
        "/v1/completions" if post => complete(front, connected, request, Interface::Text).await,
        "/health" | "/metrics" | "/v1/models" | "/v1/chat/completions" | "/v1/completions" => {
            let method = if path.ends_with("completions") {
                "POST"
            } else {
                "GET"
            };
            let what = format!(
                "{path} does not understand {}: send {method}",
                request.method()
            );
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
            let what = format!(
                "there is no {path}: there are /v1/chat/completions, /v1/completions, /v1/models, /health and /metrics"
            );
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
    front: &Rc<Front>,
    connected: Rc<Connected>,
    request: Request<Incoming>,
    interface: Interface,
) -> Response<Body> {
    let limits = front.limits();
    let (bytes_max, stalled) = (limits.request_bytes.0 as usize, limits.stalled());
    let refused =
        |status, what: &str| json_reply(status, &error(what, "invalid_request_error", None, None));
    let body = read(request.into_body(), bytes_max);
    let asked = match tokio::time::timeout(stalled, body).await {
        Ok(Ok(Some(body))) => serde_json::from_slice::<Asked>(&body),
        Ok(Ok(None)) => {
            let what = format!(
                "the request has more than {bytes_max} bytes: send less, or raise `request_bytes` under [limits]"
            );
            return refused(StatusCode::PAYLOAD_TOO_LARGE, &what);
        }
        Ok(Err(e)) => {
            let what = format!("the request broke off: {e}");
            return refused(StatusCode::BAD_REQUEST, &what);
        }
        Err(_) => {
            let what = format!(
                "the request took longer than {} s to come: send it in one go",
                stalled.as_secs()
            );
            return last_reply(refused(StatusCode::REQUEST_TIMEOUT, &what));
        }
    };
    match asked {
        Ok(asked) => answer::answer(front, connected, asked, interface).await,
        Err(e) => {
            let what = format!(
                "this is no request: {e}; send JSON like {{\"messages\":[{{\"role\":\"user\",\"content\":\"Hello\"}}]}}"
            );
            refused(StatusCode::BAD_REQUEST, &what)
        }
    }
}

/// A body of at most `bytes_max` bytes; none if it is longer. However it is cut in pieces, it takes no more memory.
async fn read(mut body: Incoming, bytes_max: usize) -> Result<Option<Vec<u8>>, hyper::Error> {
    let mut bytes = Vec::new();
    while let Some(frame) = body.frame().await {
        let Ok(piece) = frame?.into_data() else {
            continue;
        };
        if bytes.len() + piece.len() > bytes_max {
            return Ok(None);
        }
        make_room(&mut bytes, piece.len(), bytes_max);
        bytes.extend_from_slice(&piece);
    }
    Ok(Some(bytes))
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
        assert!(shown("Bearer secret") && shown("bearer secret"));
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
