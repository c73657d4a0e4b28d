//! Where models come from, as far as the server needs to know.

use std::sync::Arc;

use engine::{Pooling, Vocab};
use futures::future::BoxFuture;
use node::answer::Source;
use node::metrics::Metrics;

use crate::error::ApiError;
use crate::swarm::Seeing;

/// A model that can be asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its id, in hex.
    pub id: String,
    /// What its holders call it; may be empty.
    pub name: String,
    /// Layers of the whole model.
    pub n_layer: u16,
    /// The longest context that the peers allow.
    pub n_ctx: u32,
}

/// A model that was asked for.
pub struct Found {
    /// Its id, in hex.
    pub id: String,
    /// What it is called.
    pub name: String,
    /// Its tokenizer, where it has one.
    pub vocab: Option<Arc<Vocab>>,
    /// The longest context that the model and the peers allow.
    pub n_ctx_max: u32,
    /// How it makes a vector of a text, or why it does not.
    pub embeds: Result<Embeds, String>,
}

/// How a model makes a vector of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Embeds {
    /// Which rows count.
    pub pooling: Pooling,
    /// Numbers in a vector.
    pub n_embd: u32,
}

/// Who asks what.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// The hash of the key that was asked with.
    pub caller: Option<[u8; 32]>,
    /// The whole prompt.
    pub prompt: &'a [u32],
}

/// Finds models and opens sessions with them. Everything in it may be called at the same time.
pub trait Models: Seeing {
    /// The models of which every layer has a holder now.
    fn listed(&self) -> Vec<Listed>;

    /// Peers that this process is connected to.
    fn peers(&self) -> usize;

    /// A model by alias, name, or the beginning of its id; without a name the one that is meant then.
    fn find<'a>(&'a self, asked: Option<&'a str>) -> BoxFuture<'a, Result<Arc<Found>, ApiError>>;

    /// Opens a session of `n_ctx` positions. Where every holder is busy it may wait for a place, a bounded time.
    ///
    /// Dropping the future, or the source, frees what it holds at every peer.
    fn open<'a>(&'a self, model: &'a Found, n_ctx: u32) -> BoxFuture<'a, Result<Source, ApiError>>;

    /// The same for who asks this, so that the session may begin with what another one of the same caller computed, or
    /// is computing: then it waits for that, a bounded time.
    fn open_for<'a>(
        &'a self,
        model: &'a Found,
        asked: Asked<'a>,
        n_ctx: u32,
    ) -> BoxFuture<'a, Result<Source, ApiError>> {
        let _ = asked;
        self.open(model, n_ctx)
    }

    /// What this process counts: the server adds to it, and shows it at `/metrics`.
    fn metrics(&self) -> Metrics {
        Metrics::new("api")
    }

    /// A session that was kept of an earlier answer in the conversation that `asked` goes on with, with room for `n_ctx`
    /// positions.
    fn kept(&self, model: &Found, asked: Asked<'_>, n_ctx: u32) -> Option<Source> {
        let _ = (model, asked, n_ctx);
        None
    }

    /// A session whose answer is complete: to be kept for the next turn, or closed.
    fn keep<'a>(&'a self, model: &'a Found, asked: Asked<'a>, source: Source) -> BoxFuture<'a, ()> {
        let _ = (model, asked);
        Box::pin(source.close())
    }

    /// Who can read what is asked: `open`, `trusted` or `local`.
    fn privacy(&self) -> &'static str;

    /// The type of the activations between hops.
    fn wire(&self) -> String;
}
