//! Clients on UNIX sockets: one JSON object a line, each way.

pub mod listen;

use std::io;
use std::rc::Rc;
use std::time::Duration;

use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use self::listen::Listening;
use super::accept::accept;
use super::front::{Client, Front, refusal};
use super::lines::{Line, Lines};
use super::message::{Answer, Request, Said};
use crate::error::{Error, Kind};

/// Bytes that are written in one go.
const WRITE_BYTES: usize = 16 << 10;

/// Accepts connections until the daemon ends.
pub async fn serve(front: Rc<Front>, listening: Listening, allow_uids: Vec<u32>) {
    let listener = match listening.listener() {
        Ok(listener) => listener,
        Err(e) => return log::error!("cannot wait for clients: {e}"),
    };
    let next = async || listener.accept().await.map(|(stream, _)| stream);
    accept(&front, next, |stream| {
        let (front, allow_uids) = (Rc::clone(&front), allow_uids.clone());
        tokio::task::spawn_local(async move { connection(front, stream, &allow_uids).await });
    })
    .await;
}

/// Who is at the other end, and whether that user may use the socket.
fn peer(stream: &UnixStream, allow_uids: &[u32]) -> Result<String, Error> {
    let cred = stream.peer_cred().map_err(|e| {
        Error::new(
            Kind::Io,
            format!("cannot tell who connects: {e}"),
            "connect from this machine",
        )
    })?;
    let pid = cred.pid().map_or(String::from("?"), |pid| pid.to_string());
    let name = format!("uid {} gid {} pid {pid}", cred.uid(), cred.gid());
    if allow_uids.is_empty() || allow_uids.contains(&cred.uid()) {
        return Ok(name);
    }
    log::warn!("{name}: not in allow_uids");
    Err(Error::new(
        Kind::Usage,
        format!("user {} may not use this socket", cred.uid()),
        "add the user to `allow_uids` of the [[socket]]",
    ))
}

async fn connection(front: Rc<Front>, mut stream: UnixStream, allow_uids: &[u32]) {
    let stalled = front.limits().stalled();
    let client = match peer(&stream, allow_uids).and_then(|name| front.admit(name)) {
        Ok(client) => client,
        Err(error) => {
            let mut out = Vec::new();
            write_reply(&mut out, 0, &refusal(&error));
            // It may be gone already, and is then told nothing.
            let _ = tokio::time::timeout(stalled, stream.write_all(&out)).await;
            return;
        }
    };
    if let Err(e) = converse(&client, stream, stalled).await {
        log::info!("{}: {e}", client.name());
    }
}

/// Answers a client's lines until it goes away.
async fn converse(client: &Client, mut stream: UnixStream, stalled: Duration) -> io::Result<()> {
    let bytes_max = client.front().limits().request_bytes.0 as usize;
    let (read, mut write) = stream.split();
    let mut lines = Lines::new(BufReader::with_capacity(4096, read), bytes_max);
    let mut out = Vec::new();
    let mut reading = true;
    // One that says no more may still listen: `echo ... | socat - UNIX-CONNECT:...`.
    while reading || client.is_busy() {
        tokio::select! {
            line = lines.next(), if reading => match line? {
                None => reading = false,
                Some(line) => {
                    let (id, request) = request(line, bytes_max);
                    lines.forget();
                    let answer = match request {
                        Ok(request) => client.request(request).await,
                        Err(error) => Some(refusal(&error)),
                    };
                    if let Some(answer) = answer {
                        write_reply(&mut out, id, &answer);
                    }
                }
            },
            () = client.filled() => {}
        }
        loop {
            while out.len() < WRITE_BYTES
                && let Some(taken) = client.take()
            {
                write_reply(&mut out, taken.request, &taken.answer());
            }
            if out.is_empty() {
                break;
            }
            tokio::time::timeout(stalled, write.write_all(&out))
                .await
                .map_err(|_| {
                    io::Error::other(format!("has read nothing for {} s", stalled.as_secs()))
                })??;
            out.clear();
            out.shrink_to(WRITE_BYTES);
        }
    }
    Ok(())
}

/// The request that a line holds, and its number as far as that can be told.
fn request(line: Line<'_>, bytes_max: usize) -> (u32, Result<Request, Error>) {
    let no_request = |what: String, remedy: &str| Err(Error::new(Kind::Usage, what, remedy));
    let line = match line {
        Line::Whole(line) => line,
        Line::TooLong => {
            let what = format!("a request of more than {bytes_max} bytes");
            let remedy = "send less, or raise `request_bytes` under [limits]";
            return (0, no_request(what, remedy));
        }
    };
    match serde_json::from_slice::<Request>(line) {
        Ok(request) => (request.id, Ok(request)),
        Err(e) => {
            // Whose request it was can often be told all the same.
            let id = serde_json::from_slice(line).map_or(0, |Numbered { id }| id);
            let example = r#"send one line like {"id":1,"generate":{"prompt":{"text":"Hello"}}}"#;
            (id, no_request(format!("this is no request: {e}"), example))
        }
    }
}

/// What all requests have.
#[derive(serde::Deserialize)]
struct Numbered {
    id: u32,
}

fn write_reply(out: &mut Vec<u8>, id: u32, answer: &Answer<'_>) {
    let reply = Said { id, answer };
    serde_json::to_writer(&mut *out, &reply).expect("a reply is plain data, and a Vec takes it");
    out.push(b'\n');
}
