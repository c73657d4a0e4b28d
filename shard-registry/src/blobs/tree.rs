//! BLAKE3's own tree over a shard, cut off at groups of 16 KiB: the geometry, and which groups of a file that may
//! hold anything are right. The tree's root is the shard's id, so whoever has the bytes can make all of it.

use std::{io, ops::Range};

use bao_tree::{
    BaoTree, BlockSize, ChunkNum, ChunkRanges,
    io::{
        outboard::PreOrderMemOutboard,
        sync::{Outboard as _, ReadAt, truncate_ranges},
    },
    iter::BaoChunk,
};
use blake3::hazmat::{HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root};
use swarm_proto::{ShardId, transfer::GROUP_BYTES};

/// Hashes of every pair of halves, from the root down to the groups: 64 bytes for each group but one.
pub(super) type Outboard = PreOrderMemOutboard<Vec<u8>>;

/// 16 chunks of BLAKE3's 1 KiB.
const GROUP: BlockSize = BlockSize::from_chunk_log(4);
const CHUNKS_PER_GROUP: u64 = GROUP_BYTES / 1024;

pub(super) fn tree(bytes: u64) -> BaoTree {
    BaoTree::new(bytes, GROUP)
}

/// An outboard with nothing in it.
pub(super) fn empty(shard: &ShardId, bytes: u64) -> Outboard {
    let tree = tree(bytes);
    Outboard {
        root: root(shard),
        tree,
        data: vec![0; usize::try_from(tree.outboard_size()).unwrap_or(0)],
    }
}

pub(super) fn root(shard: &ShardId) -> blake3::Hash {
    blake3::Hash::from_bytes(shard.0.0)
}

pub(super) fn chunks(groups: &Range<u32>) -> ChunkRanges {
    let chunk = |group: u32| ChunkNum(u64::from(group) * CHUNKS_PER_GROUP);
    ChunkRanges::from(chunk(groups.start)..chunk(groups.end))
}

/// The group that begins at a byte.
pub(super) fn group_at(offset: u64) -> usize {
    usize::try_from(offset / GROUP_BYTES).unwrap_or(usize::MAX)
}

/// Bytes that `groups` of a shard of `bytes` bytes take on the wire: themselves and the hashes on the way to them.
pub fn encoded_len(bytes: u64, groups: &Range<u32>) -> u64 {
    let (tree, ranges) = (tree(bytes), chunks(groups));
    let ranges = truncate_ranges(&ranges, bytes);
    let items = tree.ranges_pre_order_chunks_iter_ref(ranges, 0);
    items.fold(0, |sum, item| match item {
        BaoChunk::Parent { .. } => sum + 64,
        BaoChunk::Leaf { size, .. } => sum + size as u64,
    })
}

/// Which groups of `data` are right, by an outboard that may be as wrong as they are. Everything is hashed but
/// what lies below a hash that is wrong already.
pub(super) fn right_groups(outboard: &Outboard, data: &impl ReadAt) -> io::Result<Vec<bool>> {
    let tree = outboard.tree();
    let mut right = Vec::new();
    let mut expected = vec![Some(outboard.root())];
    let mut group = vec![0; tree.block_size().bytes()];
    let all = ChunkRanges::all();
    for item in tree.ranges_pre_order_chunks_iter_ref(&all, 0) {
        let wanted = expected.pop().flatten();
        match item {
            BaoChunk::Parent { node, is_root, .. } => {
                let pair = wanted.and_then(|wanted| {
                    let (left, right) = outboard.load(node).ok().flatten()?;
                    (parent(&left, &right, is_root) == wanted).then_some((left, right))
                });
                expected.push(pair.map(|(_, right)| right));
                expected.push(pair.map(|(left, _)| left));
            }
            BaoChunk::Leaf {
                start_chunk,
                size,
                is_root,
                ..
            } => {
                let ok = match wanted {
                    None => false,
                    Some(wanted) => {
                        let bytes = &mut group[..size];
                        data.read_exact_at(start_chunk.to_bytes(), bytes)?;
                        leaf(start_chunk.to_bytes(), bytes, is_root) == wanted
                    }
                };
                right.push(ok);
            }
        }
    }
    Ok(right)
}

fn parent(left: &blake3::Hash, right: &blake3::Hash, is_root: bool) -> blake3::Hash {
    if is_root {
        return merge_subtrees_root(left.as_bytes(), right.as_bytes(), Mode::Hash);
    }
    let merged = merge_subtrees_non_root(left.as_bytes(), right.as_bytes(), Mode::Hash);
    blake3::Hash::from_bytes(merged)
}

fn leaf(offset: u64, bytes: &[u8], is_root: bool) -> blake3::Hash {
    if is_root {
        return blake3::hash(bytes);
    }
    let mut hasher = blake3::Hasher::new();
    hasher.set_input_offset(offset);
    hasher.update(bytes);
    blake3::Hash::from_bytes(hasher.finalize_non_root())
}
