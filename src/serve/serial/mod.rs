//! Clients on serial ports: messages in frames for a program, or lines for a person.

pub mod editor;
pub mod frame;
pub mod framed;
pub mod link;
mod others;
pub mod port;
mod terminal;

use std::io;
use std::path::Path;
use std::rc::Rc;

use self::framed::Framed;
use self::link::{Event, MESSAGE_MAX};
pub use self::others::other_user;
use self::port::Port;
use super::config::{Serial, SerialMode};
use super::front::{Client, Front, refusal};
use super::message::{Answer, Request, Said};
use crate::error::{Error, Kind};

/// Serves a port, whatever becomes of the device meanwhile.
pub async fn serve(front: Rc<Front>, serial: Serial) {
    if let Some(error) = other_user(Path::new("/"), &serial.device) {
        log::warn!("{error}");
    }
    match serial.mode {
        SerialMode::Frames => frames(front, serial).await,
        SerialMode::Text => terminal::serve(front, serial).await,
    }
}

/// Serves a program that speaks frames.
async fn frames(front: Rc<Front>, serial: Serial) {
    let (device, baud, flow) = (&serial.device, serial.baud, serial.flow);
    let port = Port::wait_for(device, baud, flow).await;
    let mut framed = Framed::new(port, baud, false);
    let mut client = None;
    loop {
        if let Err(e) = converse(&front, &serial, &mut framed, &mut client).await {
            log::warn!("{}: {e}; waiting for it to come back", device.display());
            framed.replace_port(Port::wait_for(device, baud, flow).await);
        }
    }
}

/// Answers the peer until the device is gone. The client outlives that, so that a plug may be pulled and put back.
async fn converse(
    front: &Rc<Front>,
    serial: &Serial,
    framed: &mut Framed,
    client: &mut Option<Client>,
) -> io::Result<()> {
    loop {
        // A peer that asks and asks, but acknowledges nothing, is not heard until there is room for a reply.
        while framed.link().has_room(MESSAGE_MAX)
            && let Some(event) = framed.event()
        {
            let message = match event {
                Event::Connected => {
                    // A peer that is new, or has started again, knows nothing of what was asked before.
                    *client = None;
                    match front.admit(serial.device.display().to_string()) {
                        Ok(admitted) => *client = Some(admitted),
                        Err(error) => send(framed, 0, &refusal(&error)),
                    }
                    continue;
                }
                Event::Lost => {
                    log::warn!("{}: the peer is silent", serial.device.display());
                    *client = None;
                    continue;
                }
                Event::TooLong => Err(format!("a request of more than {MESSAGE_MAX} bytes")),
                Event::Message(bytes) => postcard::from_bytes::<Request>(bytes)
                    .map_err(|e| format!("this is no request: {e}")),
            };
            let Some(client) = client else { continue };
            let (id, answer) = match message {
                Ok(request) => (request.id, client.request(request).await),
                Err(what) => {
                    let remedy = "send what serve::message::Request looks like in postcard";
                    (0, Some(refusal(&Error::new(Kind::Usage, what, remedy))))
                }
            };
            if let Some(answer) = answer {
                send(framed, id, &answer);
            }
        }
        if let Some(client) = client {
            while framed.link().has_room(MESSAGE_MAX)
                && let Some(taken) = client.take()
            {
                send(framed, taken.request, &taken.answer());
            }
        }
        let room = framed.link().has_room(MESSAGE_MAX);
        tokio::select! {
            turned = framed.turn() => turned?,
            () = filled(client), if room => {}
        }
    }
}

async fn filled(client: &Option<Client>) {
    match client {
        Some(client) => client.filled().await,
        None => std::future::pending().await,
    }
}

/// Queues a reply; there is room for the longest.
fn send(framed: &mut Framed, id: u32, answer: &Answer<'_>) {
    let mut bytes = [0; MESSAGE_MAX];
    if let Ok(bytes) = postcard::to_slice(&Said { id, answer }, &mut bytes) {
        let sent = framed.link().send(bytes);
        return debug_assert!(sent.is_ok(), "there was no room");
    }
    let what = format!("the reply has more than the {MESSAGE_MAX} bytes of a message on this line");
    let remedy = "ask on a socket, or configure fewer models and sessions";
    send(
        framed,
        id,
        &refusal(&Error::new(Kind::Unsupported, what, remedy)),
    );
}
