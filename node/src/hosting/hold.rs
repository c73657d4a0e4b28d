//! What of a mixture of experts a node holds.

use std::fmt;

use engine::Blueprint;

use super::Place;
use crate::load::{self, Found, LoadError};

/// What of a mixture of experts a node holds. Of a dense model it is layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Hold {
    /// Layers where one fits, else trunks where they are missing, else experts.
    #[default]
    Auto,
    /// Whole layers, with their experts.
    Layers,
    /// Layers without their experts, which near peers compute.
    Trunk,
    /// Experts, for the trunks of near peers.
    Experts,
}

impl fmt::Display for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Hold::Auto => "auto",
            Hold::Layers => "layers",
            Hold::Trunk => "trunk",
            Hold::Experts => "experts",
        })
    }
}

impl Hold {
    /// What it comes to for this model, with so much memory; never [`Hold::Auto`].
    ///
    /// # Errors
    /// Trunks or experts of a model that has none to tell apart.
    pub(super) fn of(self, place: &Place, found: &Found, memory: u64) -> Result<Hold, LoadError> {
        let fits = |blueprint: &Blueprint| {
            let bytes = load::layer_bytes(blueprint);
            load::windows(&bytes, memory).is_ok()
        };
        match (self, &found.experts) {
            (Hold::Layers, _) | (Hold::Auto, None) => Ok(Hold::Layers),
            (hold @ (Hold::Trunk | Hold::Experts), None) => Err(LoadError::NoMixture {
                name: found.name.clone(),
                hold,
            }),
            (hold @ (Hold::Trunk | Hold::Experts), Some(_)) => Ok(hold),
            (Hold::Auto, Some(_)) if fits(&found.blueprint) => Ok(Hold::Layers),
            (Hold::Auto, Some(_)) => {
                let trunk = found.blueprint.without_experts();
                let missing = fits(&trunk) && !trunks_are_there(place, found);
                Ok(if missing { Hold::Trunk } else { Hold::Experts })
            }
        }
    }
}

/// Whether others serve every layer of it, or are about to.
fn trunks_are_there(place: &Place, found: &Found) -> bool {
    let snapshot = place.net.adverts().snapshot();
    let others = snapshot
        .adverts
        .iter()
        .filter(|advert| advert.peer != place.net.me());
    let said: Vec<_> = others
        .flat_map(|advert| &advert.models)
        .filter(|said| said.model == found.id)
        .collect();
    let held = |layer| {
        let mut spans = said
            .iter()
            .flat_map(|said| said.live.iter().chain(&said.intended));
        spans.any(|span| span.contains(layer))
    };
    found.manifest.layers().layers().all(held)
}
