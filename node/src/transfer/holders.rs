//! Who has a shard, by what peers say of themselves. Pure but for the store's own list of models.

use std::collections::HashSet;

use shard_registry::{Manifest, ShardKind, Snapshot, Store, blobs::layer_of};
use swarm_proto::{ExpertSpan, LayerRange, ModelAdvert, ModelId, Peer, ShardId};

/// Peers that say they store or serve the shard's layer or expert, and where they listen. Who serves a layer and says
/// something of experts has others compute them, and serves no expert but those it names. Each asker has an order of its
/// own, so that not all ask the same one first.
pub fn holders(
    snapshot: &Snapshot,
    model: &ModelId,
    n_layer: u16,
    kind: ShardKind,
    me: Peer,
) -> Vec<(Peer, Vec<String>)> {
    let layer = layer_of(kind, n_layer);
    let holds = |claim: &ModelAdvert| {
        let of_layer = |span: &LayerRange| layer.is_none_or(|layer| span.contains(layer));
        let experts = claim.experts.as_ref();
        let serves = match (kind, experts) {
            (ShardKind::Expert { layer, expert }, Some(experts)) => {
                ExpertSpan::hold(&experts.live, layer, expert)
            }
            // Everybody has it who has anything.
            (ShardKind::Metadata, Some(experts)) if !experts.live.is_empty() => true,
            _ => claim.live.iter().any(of_layer),
        };
        let same = claim.model == *model && claim.n_layer == n_layer;
        same && (serves || claim.stored.iter().any(of_layer))
    };
    let others = snapshot.adverts.iter().filter(|advert| advert.peer != me);
    let mut found: Vec<_> = others
        .filter(|advert| advert.models.iter().any(holds))
        .map(|advert| (advert.peer, advert.addrs.clone()))
        .collect();
    found.sort_by_key(|(peer, _)| draw(me, *peer));
    found
}

fn draw(me: Peer, peer: Peer) -> [u8; 32] {
    blake3::derive_key("shoal holder draw 1", &[me.0, peer.0].concat())
}

/// Shards of the models here that somebody else says to have. Blocks.
pub(super) fn held_elsewhere(snapshot: &Snapshot, store: &Store, me: Peer) -> HashSet<ShardId> {
    let (models, _) = store.models();
    let manifests = models
        .into_iter()
        .filter_map(|model| Some((model.id, store.manifest(model.id).ok()?)));
    manifests
        .flat_map(|(id, manifest)| held(snapshot, &id, &manifest, me))
        .collect()
}

fn held(snapshot: &Snapshot, id: &ModelId, manifest: &Manifest, me: Peer) -> Vec<ShardId> {
    let n_layer = manifest.n_layer;
    // By layer, and for experts by what is said of them: a mixture has thousands of shards.
    let others = || snapshot.adverts.iter().filter(|advert| advert.peer != me);
    let claims = || {
        let models = others().flat_map(|advert| &advert.models);
        models.filter(|claim| claim.model == *id && claim.n_layer == n_layer)
    };
    let trunk = |layer: u16| {
        let mut spans = claims().flat_map(|claim| claim.stored.iter().chain(&claim.live));
        spans.any(|span| span.contains(layer))
    };
    let whole = |layer: u16| {
        let mut spans = claims().flat_map(|claim| {
            let live = claim.live.iter().filter(|_| claim.experts.is_none());
            claim.stored.iter().chain(live)
        });
        spans.any(|span| span.contains(layer))
    };
    let trunks: Vec<bool> = (0..n_layer).map(trunk).collect();
    let wholes: Vec<bool> = (0..n_layer).map(whole).collect();
    let experts: HashSet<(u16, u16)> = claims()
        .filter_map(|claim| claim.experts.as_ref())
        .flat_map(|experts| ExpertSpan::each(&experts.live))
        .collect();
    let is = |held: &[bool], layer: u16| held.get(usize::from(layer)).is_some_and(|held| *held);
    let shards = manifest.shards.iter().filter(|shard| match shard.kind {
        ShardKind::Expert { layer, expert } => {
            is(&wholes, layer) || experts.contains(&(layer, expert))
        }
        kind => layer_of(kind, n_layer).is_some_and(|layer| is(&trunks, layer)),
    });
    shards.map(|shard| shard.id).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use swarm_proto::{Advert, Hash, LayerRange};

    fn advert(n: u8, live: &[(u16, u16)], stored: &[(u16, u16)]) -> Arc<Advert> {
        let spans = |spans: &[(u16, u16)]| {
            let span = |&(start, end): &(u16, u16)| LayerRange { start, end };
            spans.iter().map(span).collect()
        };
        Arc::new(Advert {
            peer: Peer([n; 32]),
            seq: 1,
            ttl_ms: 1,
            addrs: Vec::new(),
            models: vec![ModelAdvert {
                model: ModelId(Hash([7; 32])),
                name: String::new(),
                n_layer: 8,
                live: spans(live),
                intended: Vec::new(),
                layer_tokens_s: None,
                n_ctx_max: 0,
                free_cells: 0,
                n_embd: 8,
                numerics: 0,
                stored: spans(stored),
                layer_bytes_max: None,
                experts: None,
            }],
            uplink_bytes_s: None,
            queue: 0,
            rtts: Vec::new(),
            leaving: false,
            agent: String::new(),
        })
    }

    #[test]
    fn who_serves_or_stores_a_layer_has_its_shards_and_the_ends_have_the_embedding_and_the_head() {
        let adverts = vec![
            advert(1, &[], &[(0, 8)]),
            advert(2, &[(0, 3)], &[]),
            advert(3, &[(5, 8)], &[]),
        ];
        let snapshot = Snapshot::new(adverts);
        let (model, me) = (ModelId(Hash([7; 32])), Peer([1; 32]));
        let found = |kind, me: Peer| {
            let found = holders(&snapshot, &model, 8, kind, me);
            let mut found: Vec<u8> = found.iter().map(|(peer, _)| peer.0[0]).collect();
            found.sort_unstable();
            found
        };
        let other = Peer([9; 32]);
        assert_eq!(found(ShardKind::Embedding, other), [1, 2]);
        assert_eq!(found(ShardKind::Layer(2), other), [1, 2]);
        assert_eq!(found(ShardKind::Layer(4), other), [1]);
        assert_eq!(
            found(
                ShardKind::Expert {
                    layer: 5,
                    expert: 1
                },
                other
            ),
            [1, 3]
        );
        assert_eq!(found(ShardKind::Head, other), [1, 3]);
        assert_eq!(found(ShardKind::Metadata, other), [1, 2, 3]);
        assert_eq!(
            found(ShardKind::Layer(4), me),
            [] as [u8; 0],
            "not ourselves"
        );
        assert!(holders(&snapshot, &model, 9, ShardKind::Head, other).is_empty());
    }

    #[test]
    fn a_trunk_has_no_experts_and_a_holder_of_experts_no_trunk() {
        let with = |n, live: &[(u16, u16)], experts: &[(u16, u16)]| {
            let mut advert = Arc::unwrap_or_clone(advert(n, live, &[]));
            advert.models[0].experts = Some(swarm_proto::ExpertsAdvert {
                live: ExpertSpan::of(experts.iter().copied()),
                ..Default::default()
            });
            Arc::new(advert)
        };
        let snapshot = Snapshot::new(vec![
            with(1, &[(0, 8)], &[(3, 1)]),
            with(2, &[], &[(3, 0), (3, 1)]),
            advert(3, &[(0, 8)], &[]),
        ]);
        let found = |kind| {
            let model = ModelId(Hash([7; 32]));
            let found = holders(&snapshot, &model, 8, kind, Peer([9; 32]));
            let mut found: Vec<u8> = found.iter().map(|(peer, _)| peer.0[0]).collect();
            found.sort_unstable();
            found
        };
        let expert = |expert| ShardKind::Expert { layer: 3, expert };
        assert_eq!(found(expert(1)), [1, 2, 3]);
        assert_eq!(found(expert(0)), [2, 3]);
        assert_eq!(found(expert(2)), [3]);
        assert_eq!(found(ShardKind::Layer(3)), [1, 3]);
        assert_eq!(found(ShardKind::Metadata), [1, 2, 3]);
    }
}
