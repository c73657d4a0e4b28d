//! Logs on standard error and, where asked for, traces to an OpenTelemetry collector. One request
//! is one trace across all hops: the W3C trace parent travels in the session's open message.

use std::io::IsTerminal;

use opentelemetry::{
    KeyValue,
    trace::{
        SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState, TracerProvider,
    },
};
use opentelemetry_otlp::WithExportConfig;
use opentelemetry_sdk::{Resource, trace::SdkTracerProvider};
use swarm_proto::TraceParent;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::{
    EnvFilter, Layer, Registry, filter::LevelFilter, layer::SubscriberExt, util::SubscriberInitExt,
};

/// What is heard where nothing is asked for: our own words, and of libraries only errors, since a
/// stranger can cause their warnings as often as it likes; of yamux not even those, for the same reason.
pub const DEFAULT_FILTER: &str = "info,libp2p=error,multistream_select=error,yamux=off,quinn=error,rustls=error,hickory_resolver=error,hickory_proto=error";

/// How to log.
#[derive(Debug, Clone, Default)]
pub struct TelemetryConfig {
    /// Directives as `RUST_LOG` takes them; [`DEFAULT_FILTER`] where none.
    pub filter: Option<String>,
    /// JSON lines instead of text.
    pub json: bool,
    /// Collector for traces (gRPC), for example `http://127.0.0.1:4317`.
    pub otlp: Option<String>,
    /// Name of this program in traces.
    pub service: &'static str,
}

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter.
    #[error("log filter {filter:?}: {reason}; write for example info or node=debug,libp2p=warn")]
    Filter {
        /// What was given.
        filter: String,
        /// Why it is wrong.
        reason: String,
    },
    /// The collector's address.
    #[error("traces to {url:?}: {reason}")]
    Otlp {
        /// What was given.
        url: String,
        /// Why it is wrong.
        reason: String,
    },
    /// Somebody set up logging already.
    #[error("logging is set up already")]
    Twice,
}

/// Keeps the exporter alive; [`Telemetry::shutdown`] sends what is left.
#[derive(Debug, Default)]
pub struct Telemetry {
    provider: Option<SdkTracerProvider>,
}

impl Telemetry {
    /// Sends the last spans, waiting a few seconds at most.
    pub fn shutdown(self) {
        if let Some(provider) = self.provider
            && let Err(error) = provider.shutdown()
        {
            tracing::warn!(%error, "the last traces were not exported");
        }
    }
}

/// Sets logging up for the whole process. Call it inside the runtime where traces are exported.
///
/// # Errors
/// On a bad filter or URL, or when called twice.
pub fn init(config: &TelemetryConfig) -> Result<Telemetry, TelemetryError> {
    let text = config
        .filter
        .clone()
        .unwrap_or_else(|| DEFAULT_FILTER.into());
    let filter = EnvFilter::builder()
        .with_default_directive(LevelFilter::INFO.into())
        .parse(&text)
        .map_err(|e| TelemetryError::Filter {
            filter: text,
            reason: e.to_string(),
        })?;
    let env = |name: &str| std::env::var(name).ok().filter(|text| !text.is_empty());
    let url = config.otlp.clone().or_else(|| endpoint(env));
    let exporting = url.as_deref().map(|url| provider(url, config.service));
    let provider = exporting.transpose()?;
    let traces = provider.as_ref().map(|provider| {
        // Spans of ours from info on; libp2p's would drown them.
        let ours = tracing_subscriber::filter::filter_fn(|meta| {
            *meta.level() <= tracing::Level::INFO
                && ["node", "engine", "api", "cli", "shoal"]
                    .iter()
                    .any(|t| meta.target().starts_with(t))
        });
        // What a span costs when it is entered is paid for each frame.
        tracing_opentelemetry::layer()
            .with_context_activation(false)
            .with_tracked_inactivity(false)
            .with_threads(false)
            .with_location(false)
            .with_tracer(provider.tracer(config.service))
            .with_filter(ours)
    });
    let ready = Registry::default()
        .with(logs(config.json).with_filter(filter))
        .with(traces);
    ready.try_init().map_err(|_| TelemetryError::Twice)?;
    Ok(Telemetry { provider })
}

fn logs(json: bool) -> Box<dyn Layer<Registry> + Send + Sync> {
    let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    if json {
        return layer.json().boxed();
    }
    let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    layer
        .compact()
        .with_ansi(colours)
        .with_target(false)
        .boxed()
}

/// Where the environment says that traces go, by the names that every OpenTelemetry program reads.
fn endpoint(env: impl Fn(&str) -> Option<String>) -> Option<String> {
    if env("OTEL_SDK_DISABLED").is_some_and(|off| off.eq_ignore_ascii_case("true")) {
        return None;
    }
    env("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT").or_else(|| env("OTEL_EXPORTER_OTLP_ENDPOINT"))
}

fn provider(url: &str, service: &'static str) -> Result<SdkTracerProvider, TelemetryError> {
    let wrong = |reason: String| TelemetryError::Otlp {
        url: url.into(),
        reason,
    };
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_tonic()
        .with_endpoint(url)
        .build()
        .map_err(|e| wrong(e.to_string()))?;
    // OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME are read first, OTEL_TRACES_SAMPLER below.
    let mut resource = Resource::builder();
    if std::env::var_os("OTEL_SERVICE_NAME").is_none() {
        resource = resource.with_service_name(service);
    }
    let resource = resource
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .build();
    Ok(SdkTracerProvider::builder()
        .with_batch_exporter(exporter)
        .with_resource(resource)
        .build())
}

/// The trace the current span belongs to, as it travels to the next hop. `None` where traces are not exported.
pub fn current_traceparent() -> Option<TraceParent> {
    let context = Span::current().context();
    let span = context.span();
    let here = span.span_context();
    if !here.is_valid() {
        return None;
    }
    Some(TraceParent::new(
        here.trace_id().to_bytes(),
        here.span_id().to_bytes(),
        here.is_sampled(),
    ))
}

/// Makes `span` a child of the span another hop described; anything invalid is ignored.
pub fn set_parent(span: &Span, parent: &TraceParent) {
    let flags = if parent.sampled() {
        TraceFlags::SAMPLED
    } else {
        TraceFlags::default()
    };
    let remote = SpanContext::new(
        TraceId::from_bytes(parent.trace_id()),
        SpanId::from_bytes(parent.span_id()),
        flags,
        true,
        TraceState::NONE,
    );
    if remote.is_valid() {
        // Fails where no exporter listens: then there is no trace to join.
        let _ = span.set_parent(opentelemetry::Context::new().with_remote_span_context(remote));
    }
}

/// A span for one session at one hop, child of what the previous hop described.
pub fn span_from(parent: Option<&TraceParent>) -> Span {
    let span = tracing::info_span!("session");
    if let Some(parent) = parent {
        set_parent(&span, parent);
    }
    span
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_crosses_a_hop() {
        let provider = SdkTracerProvider::builder().build();
        let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("test"));
        tracing::subscriber::with_default(Registry::default().with(layer), || {
            assert_eq!(current_traceparent(), None, "no span, no trace");
            let carried = tracing::info_span!("client")
                .in_scope(|| current_traceparent().expect("in a span"));
            span_from(Some(&carried)).in_scope(|| {
                let here = current_traceparent().expect("in a span");
                assert_eq!(here.trace_id(), carried.trace_id(), "same trace");
                assert_ne!(here.span_id(), carried.span_id(), "another span");
            });
            span_from(Some(&TraceParent::new([0; 16], [0; 8], true)))
                .in_scope(|| assert!(current_traceparent().is_some()));
        });
    }

    #[test]
    fn the_environment_says_where_traces_go() {
        let of = |pairs: &'static [(&str, &str)]| {
            endpoint(move |name: &str| {
                let pair = pairs.iter().find(|(known, _)| *known == name);
                pair.map(|(_, value)| String::from(*value))
            })
        };
        assert_eq!(of(&[]), None);
        let all = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://a:4317");
        let traces = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://b:4317");
        assert_eq!(
            of(&[("OTEL_EXPORTER_OTLP_ENDPOINT", "http://a:4317")]).as_deref(),
            Some(all.1)
        );
        assert_eq!(
            of(&[
                ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://a:4317"),
                ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://b:4317"),
            ])
            .as_deref(),
            Some(traces.1)
        );
        assert_eq!(
            of(&[
                ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://a:4317"),
                ("OTEL_SDK_DISABLED", "true"),
            ]),
            None
        );
    }

    #[test]
    fn what_strangers_make_libraries_say_is_not_heard() {
        let filter = EnvFilter::builder()
            .parse(DEFAULT_FILTER)
            .expect("a filter");
        tracing::subscriber::with_default(Registry::default().with(filter), || {
            assert!(tracing::enabled!(target: "node::net", tracing::Level::INFO));
            assert!(tracing::enabled!(target: "libp2p_swarm", tracing::Level::ERROR));
            assert!(!tracing::enabled!(target: "libp2p_gossipsub::protocol", tracing::Level::WARN));
            assert!(!tracing::enabled!(target: "yamux::connection", tracing::Level::ERROR));
            assert!(!tracing::enabled!(target: "rustls::conn", tracing::Level::WARN));
        });
    }
}
