//! What every request needs.

use std::sync::Arc;

use node::answer::Cancel;
use tokio::sync::Semaphore;

use crate::metrics::ApiMetrics;
use crate::models::Models;
use crate::swarm::Watch;

/// Shared by all requests.
pub struct State {
    /// Where models come from.
    pub models: Arc<dyn Models>,
    /// What is counted.
    pub metrics: ApiMetrics,
    /// One permit for each answer that may run.
    pub places: Arc<Semaphore>,
    /// How many there are.
    pub places_max: usize,
    /// Longest body.
    pub body_bytes_max: usize,
    /// One permit for each body that is read: what waits for slow ones is memory, too.
    pub bodies: Semaphore,
    /// Tokens of an answer where the request does not say.
    pub max_tokens: u32,
    /// What there is to see.
    pub watch: Watch,
    /// Set when nothing new is begun.
    pub closing: Cancel,
    /// Set when running answers must end now.
    pub ending: Cancel,
}
