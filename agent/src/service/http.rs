//! HTTP/2 under the control connections: nothing but what gRPC needs of it.

use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use caisson_protocol::limits;
use hyper::body::Incoming;
use hyper::server::conn::http2::Builder;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::sync::{Semaphore, mpsc, watch};
use tonic::Status;
use tonic::body::Body;
use tracing::{debug, warn};

use super::Router;
use crate::connection::Connection;
use crate::task;

/// The header of a call's deadline.
const TIMEOUT: &str = "grpc-timeout";
/// The most bytes of a request's headers.
const MAX_HEADERS: u32 = 16 << 10;

/// Serves each connection until `closed` is true, and then until the calls in flight have ended.
pub(super) async fn serve(
    router: Router,
    mut connections: mpsc::Receiver<Connection>,
    mut closed: watch::Receiver<bool>,
) {
    let permits = Arc::new(Semaphore::new(limits::MAX_CONTROL_CONNECTIONS));
    loop {
        let connection = tokio::select! {
            connection = connections.recv() => connection,
            () = closing(&mut closed) => None,
        };
        let Some(connection) = connection else { break };
        let Ok(permit) = permits.clone().try_acquire_owned() else {
            warn!(limit = limits::MAX_CONTROL_CONNECTIONS, "closed a control connection: too many");
            continue;
        };
        let (router, closed) = (router.clone(), closed.clone());
        task::spawn(async move {
            serve_connection(router, connection, closed).await;
            drop(permit);
        });
    }
    // All of them are there once every connection has ended. An error is not possible: nobody closes it.
    let _ = permits.acquire_many(u32::try_from(limits::MAX_CONTROL_CONNECTIONS).unwrap_or(u32::MAX)).await;
}

async fn serve_connection(router: Router, connection: Connection, mut closed: watch::Receiver<bool>) {
    let answer = service_fn(move |request: http::Request<Incoming>| {
        #[cfg(any(test, feature = "failpoints"))]
        crate::failpoint::call();
        let deadline = request.headers().get(TIMEOUT).and_then(|value| timeout(value.to_str().ok()?));
        let router = router.clone();
        async move {
            let reply = router.call(request.map(Body::new));
            let reply = match deadline {
                Some(deadline) => tokio::time::timeout(deadline, reply).await,
                None => Ok(reply.await),
            };
            let late =
                |_| Status::deadline_exceeded("the call took longer than its client allows").into_http();
            Ok::<_, Infallible>(reply.unwrap_or_else(late))
        }
    });
    let mut builder = Builder::new(TokioExecutor::new());
    builder.max_concurrent_streams(limits::MAX_IN_FLIGHT).max_header_list_size(MAX_HEADERS);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(connection), answer));
    let ended = tokio::select! {
        ended = &mut connection => ended,
        () = closing(&mut closed) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        debug!(%error, "a control connection broke");
    }
}

async fn closing(closed: &mut watch::Receiver<bool>) {
    // An error means that nobody is left to say so.
    let _ = closed.wait_for(|&closed| closed).await;
}

/// A call's deadline: up to eight digits and a unit, as gRPC over HTTP/2 defines the header `grpc-timeout`. None: it is
/// malformed, and there is none.
fn timeout(value: &str) -> Option<Duration> {
    let (digits, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
    if !(1..=8).contains(&digits.len()) || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(number * 3600)),
        "M" => Some(Duration::from_secs(number * 60)),
        "S" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_millis(number)),
        "u" => Some(Duration::from_micros(number)),
        "n" => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_have_digits_and_a_unit() {
        assert_eq!(timeout("3H"), Some(Duration::from_secs(3 * 3600)));
        assert_eq!(timeout("99999999M"), Some(Duration::from_secs(99_999_999 * 60)));
        assert_eq!(timeout("0S"), Some(Duration::ZERO));
        assert_eq!(timeout("1500m"), Some(Duration::from_millis(1500)));
        assert_eq!(timeout("7u"), Some(Duration::from_micros(7)));
        assert_eq!(timeout("7n"), Some(Duration::from_nanos(7)));
        for bad in ["", "S", "5", "5s", "+5S", "-5S", " 5S", "123456789S", "5é", "é"] {
            assert_eq!(timeout(bad), None, "{bad:?}");
        }
    }
}
