//! The agent's end: calls of any method through one copy of the transport's code.
//!
//! What `tonic` generates has a copy of it for each method, which together would be a tenth of the agent. Here a
//! method only decodes its request, calls its service and encodes the reply. `build.rs` generates the functions that
//! find a method by its name, such as [`v1::agent_method`](crate::v1::agent_method).

use std::future::{Future, ready};
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, BufMut, Bytes};
use prost::Message;
use tokio_stream::{Stream, StreamExt};
use tonic::body::Body;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::server::{Grpc, ServerStreamingService, UnaryService};
use tonic::{Request, Response, Status};

use crate::limits;

type Reply<T> = Pin<Box<dyn Future<Output = Result<Response<T>, Status>> + Send>>;
type Call<T> = Box<dyn FnOnce(Request<Bytes>) -> Reply<T> + Send>;

/// Encoded messages. A type of its own, as the compiler loses track of the lifetime of a bare trait object.
struct Messages(Pin<Box<dyn Stream<Item = Result<Bytes, Status>> + Send>>);

impl Stream for Messages {
    type Item = Result<Bytes, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.as_mut().poll_next(context)
    }
}

/// An answer to come.
pub type Answer = Pin<Box<dyn Future<Output = http::Response<Body>> + Send>>;

/// A method of a service, of messages in their encoded form.
pub struct Method(Shape);

enum Shape {
    Unary(Call<Bytes>),
    ServerStreaming(Call<Messages>),
}

impl Method {
    /// Answers a call of this method.
    pub fn serve(self, request: http::Request<Body>) -> Answer {
        let mut grpc = Grpc::new(Encoded)
            .max_decoding_message_size(limits::MAX_MESSAGE)
            .max_encoding_message_size(limits::MAX_MESSAGE);
        match self.0 {
            Shape::Unary(call) => Box::pin(async move { grpc.unary(Once(Some(call)), request).await }),
            Shape::ServerStreaming(call) => {
                Box::pin(async move { grpc.server_streaming(Once(Some(call)), request).await })
            }
        }
    }
}

/// A method with one reply.
pub(crate) fn unary<Q, A, F>(call: impl FnOnce(Request<Q>) -> F + Send + 'static) -> Method
where
    Q: Message + Default,
    A: Message + 'static,
    F: Future<Output = Result<Response<A>, Status>> + Send + 'static,
{
    Method(Shape::Unary(Box::new(|request| match decode(request) {
        Ok(request) => {
            let reply = call(request);
            Box::pin(async { Ok(reply.await?.map(|message| message.encode_to_vec().into())) })
        }
        Err(status) => Box::pin(ready(Err(status))),
    })))
}

/// A method that streams its replies.
pub(crate) fn server_streaming<Q, A, S, F>(call: impl FnOnce(Request<Q>) -> F + Send + 'static) -> Method
where
    Q: Message + Default,
    A: Message + 'static,
    S: Stream<Item = Result<A, Status>> + Send + 'static,
    F: Future<Output = Result<Response<S>, Status>> + Send + 'static,
{
    Method(Shape::ServerStreaming(Box::new(|request| match decode(request) {
        Ok(request) => {
            let reply = call(request);
            Box::pin(async {
                let encode =
                    |message: Result<A, Status>| message.map(|message| message.encode_to_vec().into());
                Ok(reply.await?.map(|messages| Messages(Box::pin(messages.map(encode)))))
            })
        }
        Err(status) => Box::pin(ready(Err(status))),
    })))
}

fn decode<Q: Message + Default>(request: Request<Bytes>) -> Result<Request<Q>, Status> {
    let (metadata, extensions, bytes) = request.into_parts();
    let message =
        Q::decode(bytes).map_err(|error| Status::internal(format!("the request is malformed: {error}")))?;
    Ok(Request::from_parts(metadata, extensions, message))
}

/// The transport calls it once for one request.
struct Once<T>(Option<Call<T>>);

impl<T: Send + 'static> Once<T> {
    fn call(&mut self, request: Request<Bytes>) -> Reply<T> {
        match self.0.take() {
            Some(call) => call(request),
            None => Box::pin(ready(Err(Status::internal("one request, two calls")))),
        }
    }
}

impl UnaryService<Bytes> for Once<Bytes> {
    type Response = Bytes;
    type Future = Reply<Bytes>;

    fn call(&mut self, request: Request<Bytes>) -> Self::Future {
        Once::call(self, request)
    }
}

impl ServerStreamingService<Bytes> for Once<Messages> {
    type Response = Bytes;
    type ResponseStream = Messages;
    type Future = Reply<Messages>;

    fn call(&mut self, request: Request<Bytes>) -> Self::Future {
        Once::call(self, request)
    }
}

/// A codec of messages that are encoded already.
#[derive(Clone, Copy)]
struct Encoded;

impl Codec for Encoded {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Encoded {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, message: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(message);
        Ok(())
    }
}

impl Decoder for Encoded {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(buffer.copy_to_bytes(buffer.remaining())))
    }
}

#[cfg(all(test, feature = "client"))]
mod tests {
    use std::convert::Infallible;
    use std::sync::Arc;

    use tonic::Code;
    use tonic::metadata::MetadataValue;
    use tower::service_fn;

    use super::*;
    use crate::v1::{self, agent_client::AgentClient, agent_server::Agent};

    /// Answers with what it was asked.
    struct Echo;

    type Events = tokio_stream::Iter<std::vec::IntoIter<Result<v1::Event, Status>>>;
    type Lines = tokio_stream::Empty<Result<v1::LogLine, Status>>;

    #[tonic::async_trait]
    impl Agent for Echo {
        type EventsStream = Events;
        type LogsStream = Lines;

        async fn version(
            &self,
            request: Request<v1::VersionRequest>,
        ) -> Result<Response<v1::VersionResponse>, Status> {
            let epoch =
                request.metadata().get("mark").map(|mark| mark.as_bytes().to_vec()).unwrap_or_default();
            let protocol = request.into_inner().max_protocol;
            let mut reply = Response::new(v1::VersionResponse { protocol, epoch, ..Default::default() });
            reply.metadata_mut().insert("mark", MetadataValue::from_static("seen"));
            Ok(reply)
        }

        async fn health(
            &self,
            _: Request<v1::HealthRequest>,
        ) -> Result<Response<v1::HealthResponse>, Status> {
            Err(Status::not_found("health"))
        }

        async fn guest_details(
            &self,
            _: Request<v1::GuestDetailsRequest>,
        ) -> Result<Response<v1::GuestDetailsResponse>, Status> {
            Ok(Response::new(Default::default()))
        }

        async fn metrics(
            &self,
            _: Request<v1::MetricsRequest>,
        ) -> Result<Response<v1::MetricsResponse>, Status> {
            let large = v1::Metric { name: "x".repeat(limits::MAX_MESSAGE), ..Default::default() };
            Ok(Response::new(v1::MetricsResponse { metrics: vec![large] }))
        }

        async fn restrict_policy(
            &self,
            _: Request<v1::RestrictPolicyRequest>,
        ) -> Result<Response<v1::RestrictPolicyResponse>, Status> {
            Ok(Response::new(Default::default()))
        }

        async fn events(&self, request: Request<v1::EventsRequest>) -> Result<Response<Events>, Status> {
            let first = v1::Event { sequence: request.into_inner().from_sequence, ..Default::default() };
            let items = vec![Ok(first), Ok(v1::Event::default()), Err(Status::out_of_range("gap"))];
            Ok(Response::new(tokio_stream::iter(items)))
        }

        async fn logs(&self, _: Request<v1::LogsRequest>) -> Result<Response<Lines>, Status> {
            Err(Status::unavailable("logs"))
        }
    }

    async fn serve(request: http::Request<Body>) -> Result<http::Response<Body>, Infallible> {
        let name = request.uri().path().rsplit('/').next().unwrap_or_default().to_owned();
        let unknown = || Status::unimplemented("no such method").into_http();
        Ok(match v1::agent_method(Arc::new(Echo), &name) {
            Some(method) => method.serve(request).await,
            None => unknown(),
        })
    }

    #[tokio::test]
    async fn a_reply_comes_with_its_metadata() {
        let mut client = AgentClient::new(service_fn(serve));
        let mut request = Request::new(v1::VersionRequest { max_protocol: 7, ..Default::default() });
        request.metadata_mut().insert("mark", "yes".parse().unwrap());
        let reply = client.version(request).await.unwrap();
        assert_eq!(reply.metadata().get("mark").unwrap(), "seen");
        assert_eq!((reply.get_ref().protocol, &*reply.get_ref().epoch), (7, &b"yes"[..]));
    }

    #[tokio::test]
    async fn a_stream_comes_in_order_and_with_its_error() {
        let mut client = AgentClient::new(service_fn(serve));
        let request = v1::EventsRequest { from_sequence: 5, ..Default::default() };
        let mut events = client.events(request).await.unwrap().into_inner();
        assert_eq!(events.message().await.unwrap().unwrap().sequence, 5);
        assert_eq!(events.message().await.unwrap().unwrap().sequence, 0);
        assert_eq!(events.message().await.unwrap_err().code(), Code::OutOfRange);
    }

    #[tokio::test]
    async fn errors_keep_their_codes() {
        let mut client = AgentClient::new(service_fn(serve));
        assert_eq!(client.health(v1::HealthRequest {}).await.unwrap_err().code(), Code::NotFound);
        let refused = client.logs(v1::LogsRequest::default()).await.unwrap_err();
        assert_eq!((refused.code(), refused.message()), (Code::Unavailable, "logs"));
    }

    #[tokio::test]
    async fn messages_are_bounded_both_ways() {
        let mut client = AgentClient::new(service_fn(serve)).max_decoding_message_size(usize::MAX);
        let large = client.metrics(v1::MetricsRequest {}).await.unwrap_err();
        assert_eq!(large.code(), Code::OutOfRange, "{large}");
    }

    #[tokio::test]
    async fn a_malformed_request_is_an_error() {
        let call = |bytes: &'static [u8]| {
            let Some(Method(Shape::Unary(call))) = v1::agent_method(Arc::new(Echo), "Version") else {
                panic!("no method")
            };
            call(Request::new(Bytes::from_static(bytes)))
        };
        assert_eq!(call(b"\xff\xff\xff").await.unwrap_err().code(), Code::Internal);
        assert!(call(b"").await.is_ok());
        assert!(v1::agent_method(Arc::new(Echo), "version").is_none());
    }
}
