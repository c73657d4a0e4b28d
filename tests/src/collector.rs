//! A collector of traces: just enough of OTLP over gRPC that the programs' own exporter is content with it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use h2::server::SendResponse;
use h2::{RecvStream, SendStream};
use http::{HeaderMap, HeaderValue, Request, Response};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value::Value};
use prost::Message;
use prost::bytes::Bytes;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use crate::{PATIENCE, until};

/// More than an exporter sends at once.
const REQUEST_BYTES_MAX: usize = 8 << 20;

/// A span as it came.
#[derive(Clone, Debug, PartialEq)]
pub struct Seen {
    /// The program that had it.
    pub service: String,
    /// Its trace, in hex.
    pub trace: String,
    /// Its own id, in hex.
    pub id: String,
    /// Its parent's id; empty for a root.
    pub parent: String,
    /// What it is called.
    pub name: String,
    /// What is said of it.
    pub attributes: BTreeMap<String, String>,
    /// How long it took.
    pub took: Duration,
}

impl Seen {
    /// A number that is said of it.
    pub fn number(&self, name: &str) -> Option<u64> {
        self.attributes.get(name)?.parse().ok()
    }
}

/// A collector that listens until it is dropped.
pub struct Collector {
    addr: SocketAddr,
    spans: Arc<Mutex<Vec<Seen>>>,
    /// Everything that came, as it came.
    raw: Arc<Mutex<Vec<u8>>>,
    listening: JoinHandle<()>,
}

impl Collector {
    /// Listens on a free port.
    ///
    /// # Errors
    /// There is none.
    pub async fn start() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let addr = listener.local_addr()?;
        let (spans, raw) = (Arc::default(), Arc::default());
        let into = (Arc::clone(&spans), Arc::clone(&raw));
        let listening = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let into = into.clone();
                tokio::spawn(async move { connection(stream, into).await });
            }
        });
        Ok(Self {
            addr,
            spans,
            raw,
            listening,
        })
    }

    /// As `--otlp` takes it.
    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// The spans that came so far.
    pub fn spans(&self) -> Vec<Seen> {
        lock(&self.spans).clone()
    }

    /// Whether these bytes came in any of them.
    pub fn heard(&self, word: &str) -> bool {
        let raw = lock(&self.raw);
        raw.windows(word.len()).any(|it| it == word.as_bytes())
    }

    /// Waits until `wanted` finds what it looks for among the spans.
    ///
    /// # Errors
    /// It does not come.
    pub async fn until<T>(
        &self,
        what: &str,
        mut wanted: impl FnMut(&[Seen]) -> Option<T>,
    ) -> Result<T> {
        let found = until(what, PATIENCE, async || wanted(&self.spans())).await;
        found.with_context(|| format!("of {:#?}", self.spans()))
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.listening.abort();
    }
}

type Into = (Arc<Mutex<Vec<Seen>>>, Arc<Mutex<Vec<u8>>>);

async fn connection(stream: TcpStream, into: Into) -> Result<()> {
    let mut connection = h2::server::handshake(stream).await?;
    while let Some(request) = connection.accept().await {
        let (request, respond) = request?;
        let into = into.clone();
        tokio::spawn(async move { answer(request, respond, into).await });
    }
    Ok(())
}

/// A unary call: a message with five bytes before it in, one out, and the status in the trailers.
async fn answer(
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    (spans, raw): Into,
) -> Result<()> {
    let mut body = request.into_body();
    let mut bytes = Vec::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk?;
        body.flow_control().release_capacity(chunk.len())?;
        bytes.extend_from_slice(&chunk);
        ensure!(bytes.len() <= REQUEST_BYTES_MAX, "too long");
    }
    let message = bytes.get(5..).context("no message")?;
    lock(&raw).extend_from_slice(message);
    let request = ExportTraceServiceRequest::decode(message)?;
    lock(&spans).extend(seen(request));
    let head = Response::builder().header("content-type", "application/grpc");
    let mut out: SendStream<Bytes> = respond.send_response(head.body(())?, false)?;
    out.send_data(Bytes::from_static(&[0; 5]), false)?;
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    out.send_trailers(trailers)?;
    Ok(())
}

fn seen(request: ExportTraceServiceRequest) -> Vec<Seen> {
    let mut all = Vec::new();
    for resource in request.resource_spans {
        let of = resource.resource.map(|it| attributes(it.attributes));
        let service = of.and_then(|of| of.get("service.name").cloned());
        let scopes = resource.scope_spans.into_iter();
        for span in scopes.flat_map(|scope| scope.spans) {
            let ns = span.end_time_unix_nano - span.start_time_unix_nano;
            all.push(Seen {
                service: service.clone().unwrap_or_default(),
                trace: hex(&span.trace_id),
                id: hex(&span.span_id),
                parent: hex(&span.parent_span_id),
                name: span.name,
                attributes: attributes(span.attributes),
                took: Duration::from_nanos(ns),
            });
        }
    }
    all
}

fn attributes(all: Vec<KeyValue>) -> BTreeMap<String, String> {
    let text = |value: Value| match value {
        Value::StringValue(text) => text,
        Value::BoolValue(it) => it.to_string(),
        Value::IntValue(it) => it.to_string(),
        Value::DoubleValue(it) => it.to_string(),
        other => format!("{other:?}"),
    };
    let pair = |pair: KeyValue| Some((pair.key, text(pair.value?.value?)));
    all.into_iter().filter_map(pair).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn lock<T>(of: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}
