//! The one loop that lets connections in.

use std::io;
use std::time::Duration;

use super::front::Front;

/// When no connection can be accepted (no descriptors), how long to let things be.
const PAUSE: Duration = Duration::from_millis(100);

/// Accepts connections by `next` until the daemon ends, and hands each to `connect`.
pub async fn accept<S>(
    front: &Front,
    mut next: impl AsyncFnMut() -> io::Result<S>,
    mut connect: impl FnMut(S),
) {
    loop {
        let accepted = tokio::select! {
            accepted = next() => accepted,
            () = front.stopped() => return,
        };
        match accepted {
            Ok(stream) => connect(stream),
            Err(e) => {
                log::warn!("cannot accept a client: {e}");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}
