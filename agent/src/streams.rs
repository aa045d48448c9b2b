//! Byte streams between the host's connections and the guest's pipes, terminals, sockets and files.
//!
//! A [`Registry`] issues stream ids and hands connections to the [`Port`] that waits for them. The pumps move the
//! bytes; see `caisson_protocol::stream` for what the ends of a connection mean.

mod fd;
mod pump;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use caisson_protocol::limits::MAX_STREAM_CONNECTIONS;
use caisson_protocol::stream::{self, Refusal};
use tokio::sync::{Semaphore, mpsc};
use tracing::debug;

use crate::connection::Connection;

pub use fd::Fd;
pub use pump::{Exit, Finish, drain, feed, forward, terminal};

/// Issues stream ids, and finds the stream that a connection asks for. Clones share one state.
#[derive(Clone, Debug)]
pub struct Registry {
    table: Arc<Mutex<Table>>,
    /// Connections that may still be attached: each has buffers.
    room: Arc<Semaphore>,
}

impl Default for Registry {
    fn default() -> Registry {
        Registry::with_room(MAX_STREAM_CONNECTIONS)
    }
}

#[derive(Debug, Default)]
struct Table {
    issued: u64,
    open: HashMap<u64, Slot>,
}

#[derive(Clone, Debug)]
struct Slot {
    sender: mpsc::Sender<Connection>,
    attached: Arc<AtomicBool>,
}

/// The guest's end of a stream: receives its connections, one at a time. Dropping it ends the stream.
#[derive(Debug)]
pub struct Port {
    id: u64,
    receiver: mpsc::Receiver<Connection>,
    attached: Arc<AtomicBool>,
    registry: Registry,
}

impl Registry {
    fn with_room(connections: usize) -> Registry {
        Registry { table: Arc::default(), room: Arc::new(Semaphore::new(connections)) }
    }

    /// A new stream.
    pub fn open(&self) -> Port {
        let (sender, receiver) = mpsc::channel(1);
        let attached = Arc::new(AtomicBool::new(false));
        let mut table = self.lock();
        table.issued = table.issued.saturating_add(1);
        let id = table.issued;
        table.open.insert(id, Slot { sender, attached: attached.clone() });
        Port { id, receiver, attached, registry: self.clone() }
    }

    /// How many streams exist.
    pub fn count(&self) -> usize {
        self.lock().open.len()
    }

    /// Serves a fresh connection: its handshake, then its stream.
    pub async fn attach(&self, mut connection: Connection) {
        let hello = match stream::accept(&mut connection).await {
            Ok(hello) => hello,
            Err(error) => {
                debug!(%error, "refused a stream connection");
                return;
            }
        };
        let slot = self.lock().open.get(&hello.stream).cloned();
        let refusal = match slot {
            None => Refusal::NotFound,
            Some(slot) if slot.attached.swap(true, Ordering::AcqRel) => Refusal::Busy,
            Some(slot) => match self.room.clone().try_acquire_owned() {
                Ok(place) => {
                    if stream::answer(&mut connection, Ok(())).await.is_err() {
                        slot.attached.store(false, Ordering::Release);
                    } else {
                        // A port that went away meanwhile closes the connection: the stream has ended.
                        let _ = slot.sender.send(connection.in_place(place)).await;
                    }
                    return;
                }
                Err(_) => {
                    slot.attached.store(false, Ordering::Release);
                    Refusal::Exhausted
                }
            },
        };
        let _ = stream::answer(&mut connection, Err(refusal)).await;
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Port {
    /// What the host has to ask for.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The next connection.
    pub async fn connection(&mut self) -> Connection {
        match self.receiver.recv().await {
            Some(connection) => connection,
            // The registry holds a sender as long as the port lives.
            None => std::future::pending().await,
        }
    }

    /// The connection is gone; another may come.
    pub fn detached(&self) {
        self.attached.store(false, Ordering::Release);
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        self.registry.lock().open.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use caisson_protocol::stream::{HandshakeError, attach};
    use tokio::io::duplex;

    use super::*;

    async fn connect(registry: &Registry, id: u64) -> Result<tokio::io::DuplexStream, HandshakeError> {
        let (mut host, agent) = duplex(64);
        let (result, ()) = tokio::join!(attach(&mut host, id), registry.attach(Connection::new(agent)));
        result.map(|()| host)
    }

    #[tokio::test]
    async fn so_many_connections_at_a_time() {
        let registry = Registry::with_room(1);
        let (mut first, second) = (registry.open(), registry.open());
        let _host = connect(&registry, first.id()).await.unwrap();
        let connection = first.connection().await;
        for _ in 0..2 {
            let refused = connect(&registry, second.id()).await;
            assert!(matches!(refused, Err(HandshakeError::Refused(Refusal::Exhausted))));
        }
        drop(connection);
        connect(&registry, second.id()).await.unwrap();
    }

    #[tokio::test]
    async fn one_connection_at_a_time() {
        let registry = Registry::default();
        let mut port = registry.open();
        let _host = connect(&registry, port.id()).await.unwrap();
        let second = connect(&registry, port.id()).await;
        assert!(matches!(second, Err(HandshakeError::Refused(Refusal::Busy))));
        drop(port.connection().await);
        port.detached();
        connect(&registry, port.id()).await.unwrap();
    }

    #[tokio::test]
    async fn an_ended_stream_is_not_found() {
        let registry = Registry::default();
        let port = registry.open();
        let id = port.id();
        drop(port);
        let refused = connect(&registry, id).await;
        assert!(matches!(refused, Err(HandshakeError::Refused(Refusal::NotFound))));
        assert_eq!(registry.count(), 0);
        assert_ne!(registry.open().id(), id, "ids are never issued twice");
    }
}
