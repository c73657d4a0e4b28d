//! What a peer says of itself, signed. It expires by itself; a newer one (by `seq`) replaces it.
//!
//! The signature covers the swarm's id, so that an advert cannot be carried into another swarm.
//! What is claimed is a claim: who reads it measures for itself where it matters.

use bincode::{Decode, Encode};
use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use serde::Serialize;

use crate::{
    ExpertsAdvert, LayerRange, ModelId, Peer, SwarmId,
    codec::{CheckError, CodecError, Message, at_most, decode, encode, wrong},
    session::check_addrs,
};

/// Largest advert.
pub const ADVERT_BYTES_MAX: usize = 16 * 1024;
/// Longest life of an advert: who is silent for longer is gone.
pub const TTL_MS_MAX: u32 = 120_000;
/// Most addresses of a peer.
pub const ADVERT_ADDRS_MAX: usize = 8;
/// Most models of a peer.
pub const ADVERT_MODELS_MAX: usize = 16;
/// Most separate spans of one model.
pub const ADVERT_SPANS_MAX: usize = 64;
/// Most neighbours with a measured round trip.
pub const ADVERT_RTTS_MAX: usize = 64;
/// Longest name of a model.
pub const NAME_BYTES_MAX: usize = 64;
/// Longest agent text.
pub const AGENT_BYTES_MAX: usize = 64;

/// The shortest context that a node makes. Contexts come in powers of two from here on, so that they
/// can be used again.
pub const SESSION_POSITIONS_MIN: u32 = 256;

/// Positions that a session of `n_ctx` takes in the KV of each of its layers.
pub fn session_positions(n_ctx: u32) -> u64 {
    u64::from(n_ctx.max(SESSION_POSITIONS_MIN)).next_power_of_two()
}

/// Separates these signatures from any other use of the key.
const DOMAIN: &[u8] = b"shoal advert 1\0";

/// A figure with the age of its measurement.
#[derive(Debug, Clone, Copy, PartialEq, Encode, Decode, Serialize)]
pub struct Measured {
    /// The figure; its unit is in the field's name.
    pub value: f32,
    /// Seconds since it was measured.
    pub age_s: u32,
}

/// What a peer says of itself.
#[derive(Debug, Clone, PartialEq, Encode, Decode, Serialize)]
pub struct Advert {
    /// Who.
    pub peer: Peer,
    /// When, in ms since 1970 by its own clock: a newer advert has a larger one.
    pub seq: u64,
    /// How long it holds, at most [`TTL_MS_MAX`].
    pub ttl_ms: u32,
    /// Where it listens.
    pub addrs: Vec<String>,
    /// What it serves.
    pub models: Vec<ModelAdvert>,
    /// Measured uplink, in bytes a second.
    pub uplink_bytes_s: Option<Measured>,
    /// Frames waiting for its stage worker.
    pub queue: u16,
    /// Round trips to neighbours, in µs.
    pub rtts: Vec<(Peer, u32)>,
    /// It is shutting down: take it out of every table.
    pub leaving: bool,
    /// Program and version.
    pub agent: String,
}

/// What a peer says of one model.
#[derive(Debug, Clone, PartialEq, Encode, Decode, Serialize)]
pub struct ModelAdvert {
    /// The model.
    pub model: ModelId,
    /// What the peer calls it: a hint for people, never a key.
    pub name: String,
    /// Layers of the whole model.
    pub n_layer: u16,
    /// Layers served now. Layer 0 brings the embedding, the last one the head.
    pub live: Vec<LayerRange>,
    /// Layers that will be served.
    pub intended: Vec<LayerRange>,
    /// Measured rows a second through one layer.
    pub layer_tokens_s: Option<Measured>,
    /// Largest context a session may ask for.
    pub n_ctx_max: u32,
    /// Free KV in layer-positions: room for one position of one layer each. A session takes
    /// [`session_positions`] of them for each layer that its route gives to the peer, see
    /// [`ModelAdvert::room`].
    pub free_cells: u64,
    /// Numbers in a row.
    pub n_embd: u32,
    /// The numerics class: equal numbers compute equal bits.
    pub numerics: u64,
    /// Layers whose shards it gives to others; who has the first has the embedding, the last one the head.
    pub stored: Vec<LayerRange>,
    /// Most bytes that its layers may take, of which it serves those that are needed most; none where they stay
    /// what they are, because its owner said so or it is a program that does not move.
    pub layer_bytes_max: Option<u64>,
    /// What it says of the model's experts, where the model is a mixture and it holds some or has others compute them.
    pub experts: Option<ExpertsAdvert>,
}

impl Advert {
    /// Everything that can be said without a clock or a key.
    ///
    /// # Errors
    /// The first rule broken, with value and limit.
    pub fn check(&self) -> Result<(), CheckError> {
        if self.ttl_ms == 0 {
            return Err(wrong("a time to live of 0 ms"));
        }
        let ttl = self.ttl_ms as usize;
        at_most("time to live in ms", ttl, TTL_MS_MAX as usize)?;
        check_addrs(&self.addrs, ADVERT_ADDRS_MAX)?;
        at_most("models of a peer", self.models.len(), ADVERT_MODELS_MAX)?;
        at_most("measured round trips", self.rtts.len(), ADVERT_RTTS_MAX)?;
        at_most(
            "bytes of the agent's text",
            self.agent.len(),
            AGENT_BYTES_MAX,
        )?;
        check_figure("uplink", self.uplink_bytes_s)?;
        for (i, model) in self.models.iter().enumerate() {
            model.check()?;
            if self.models[..i]
                .iter()
                .any(|other| other.model == model.model)
            {
                return Err(wrong(format!("model {} twice", model.model)));
            }
        }
        Ok(())
    }
}

impl ModelAdvert {
    fn check(&self) -> Result<(), CheckError> {
        at_most("bytes of a model's name", self.name.len(), NAME_BYTES_MAX)?;
        at_most("live spans", self.live.len(), ADVERT_SPANS_MAX)?;
        at_most("intended spans", self.intended.len(), ADVERT_SPANS_MAX)?;
        at_most("stored spans", self.stored.len(), ADVERT_SPANS_MAX)?;
        check_figure("layer speed", self.layer_tokens_s)?;
        if let Some(experts) = &self.experts {
            experts.check(self.n_layer)?;
        }
        for span in self.live.iter().chain(&self.intended).chain(&self.stored) {
            if span.is_empty() || span.end > self.n_layer {
                let n_layer = self.n_layer;
                return Err(wrong(format!(
                    "layers {span} of a model that has {n_layer} layers"
                )));
            }
        }
        Ok(())
    }

    /// Layers of a session of `n_ctx` positions that the peer has room for, by what it says is free.
    pub fn room(&self, n_ctx: u32) -> u64 {
        if n_ctx > self.n_ctx_max {
            return 0;
        }
        self.free_cells / session_positions(n_ctx)
    }

    /// Whether every layer of `span` is live, in one piece or several that touch.
    pub fn serves(&self, span: LayerRange) -> bool {
        LayerRange::merge(self.live.clone())
            .iter()
            .any(|live| live.covers(span))
    }
}

pub(crate) fn check_figure(what: &str, figure: Option<Measured>) -> Result<(), CheckError> {
    match figure {
        Some(Measured { value, .. }) if !value.is_finite() || value < 0.0 => {
            Err(wrong(format!("{what} of {value}")))
        }
        _ => Ok(()),
    }
}

impl Message for Advert {
    const NAME: &'static str = "advert";
    const BYTES_MAX: usize = ADVERT_BYTES_MAX;

    fn check(&self) -> Result<(), CheckError> {
        Advert::check(self)
    }
}

/// An advert as it travels: its bytes and the peer's signature.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedAdvert {
    /// The advert's encoding.
    pub bytes: Vec<u8>,
    /// ed25519, over a domain, the swarm's id and the bytes.
    pub signature: [u8; 64],
}

/// Why an advert is refused, or cannot be made. All but `Encode` are the sender's fault.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AdvertError {
    /// Larger than an advert may be.
    #[error("advert of {len} bytes, the limit is {ADVERT_BYTES_MAX}")]
    Large {
        /// Its length.
        len: usize,
    },
    /// No advert, or one that breaks the rules.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// Its peer is not a key.
    #[error("advert of {peer}, which is not an ed25519 key")]
    Key {
        /// Whom it speaks of.
        peer: Peer,
    },
    /// Not signed by the peer it speaks of, for this swarm.
    #[error("advert of {peer}: its signature is wrong for swarm {swarm}")]
    Signature {
        /// Whom it speaks of.
        peer: Peer,
        /// The swarm it was held against.
        swarm: SwarmId,
    },
    /// The secret given belongs to another peer.
    #[error("advert of {peer} cannot be signed with the key of {signer}")]
    Signer {
        /// Whom it speaks of.
        peer: Peer,
        /// Whose key was given.
        signer: Peer,
    },
}

impl SignedAdvert {
    /// Signs an advert with the peer's secret key.
    ///
    /// # Errors
    /// The advert breaks a rule, or speaks of another peer.
    pub fn sign(
        advert: &Advert,
        swarm: &SwarmId,
        secret: &[u8; 32],
    ) -> Result<SignedAdvert, AdvertError> {
        let key = SigningKey::from_bytes(secret);
        let signer = Peer(key.verifying_key().to_bytes());
        let peer = advert.peer;
        if signer != peer {
            return Err(AdvertError::Signer { peer, signer });
        }
        let mut bytes = Vec::new();
        encode(advert, &mut bytes)?;
        let signature = key.sign(&signed_bytes(swarm, &bytes)).to_bytes();
        Ok(SignedAdvert { bytes, signature })
    }

    /// The advert, once its bounds, its rules and its signature are found right, in this order:
    /// the cheap checks first.
    ///
    /// # Errors
    /// The first that is not.
    pub fn verify(&self, swarm: &SwarmId) -> Result<Advert, AdvertError> {
        let len = self.bytes.len();
        if len > ADVERT_BYTES_MAX {
            return Err(AdvertError::Large { len });
        }
        let advert: Advert = decode(&self.bytes)?;
        let peer = advert.peer;
        let key = VerifyingKey::from_bytes(&peer.0).map_err(|_| AdvertError::Key { peer })?;
        let signature = Signature::from_bytes(&self.signature);
        key.verify_strict(&signed_bytes(swarm, &self.bytes), &signature)
            .map_err(|_| AdvertError::Signature {
                peer,
                swarm: swarm.clone(),
            })?;
        Ok(advert)
    }

    /// As gossip carries it: the signature, then the advert.
    pub fn to_bytes(&self) -> Vec<u8> {
        [&self.signature[..], &self.bytes].concat()
    }

    /// The reverse of [`SignedAdvert::to_bytes`]; nothing is verified yet.
    ///
    /// # Errors
    /// Too short for a signature, or too long for an advert.
    pub fn from_bytes(bytes: &[u8]) -> Result<SignedAdvert, AdvertError> {
        let len = bytes.len();
        let short = || CodecError::Short {
            name: "signed advert",
            len,
        };
        let (signature, advert) = bytes.split_first_chunk().ok_or_else(short)?;
        if advert.len() > ADVERT_BYTES_MAX {
            return Err(AdvertError::Large { len: advert.len() });
        }
        Ok(SignedAdvert {
            bytes: advert.to_vec(),
            signature: *signature,
        })
    }
}

fn signed_bytes(swarm: &SwarmId, bytes: &[u8]) -> Vec<u8> {
    // The zero byte ends the swarm's id, which cannot hold one.
    [DOMAIN, swarm.as_str().as_bytes(), &[0], bytes].concat()
}

impl Peer {
    /// The peer of a secret key.
    pub fn of_secret(secret: &[u8; 32]) -> Peer {
        Peer(SigningKey::from_bytes(secret).verifying_key().to_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_whole_layers_of_the_context_that_a_node_would_make() {
        let room = |n_ctx, free_cells| {
            let model = ModelAdvert {
                model: ModelId(crate::Hash([0; 32])),
                name: String::new(),
                n_layer: 8,
                live: Vec::new(),
                intended: Vec::new(),
                layer_tokens_s: None,
                n_ctx_max: 4096,
                free_cells,
                n_embd: 8,
                numerics: 0,
                stored: Vec::new(),
                layer_bytes_max: None,
                experts: None,
            };
            model.room(n_ctx)
        };
        assert_eq!(room(1, 255), 0);
        assert_eq!(room(1, 256), 1);
        assert_eq!(room(257, 5 * 512 + 511), 5);
        assert_eq!(room(4096, 8 * 4096), 8);
        assert_eq!(room(4097, u64::MAX), 0, "longer than it allows");
        assert_eq!(session_positions(u32::MAX), 1 << 32);
    }
}
