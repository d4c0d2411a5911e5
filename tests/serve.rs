//! The daemon as programs use it: sockets, serial lines, HTTP, and the service manager.

#[path = "support/daemon.rs"]
mod daemon;
#[path = "serve/http.rs"]
mod http;
#[path = "serve/loading.rs"]
mod loading;
#[path = "support/models.rs"]
mod models;
#[path = "serve/serial.rs"]
mod serial;
#[path = "serve/socket.rs"]
mod socket;
#[path = "serve/system.rs"]
mod system;
