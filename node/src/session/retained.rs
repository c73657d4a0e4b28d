//! What a hop sent on, kept until the session closes: a replacement of the hop below is fed from it,
//! so that nobody above computes anything again.
//!
//! ```text
//! push ─▶ [ memory, in pieces ] ─▶ node's budget full ─▶ [ unlinked file ] ─▶ that full too ─▶ lost
//! ```
//!
//! Frames keep their boundaries: computed in the same portions, rows have the same bits. Where even
//! the disk's budget is full the session goes on without: a failure below it is then mended by
//! computing from the token ids.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use swarm_proto::Rows;

use super::standby::Sent;

/// Bytes taken from a budget at once.
const PIECE: usize = 256 * 1024;

/// What all sessions of a node may keep together.
#[derive(Debug)]
pub(super) struct Budget {
    memory: Pool,
    disk: Pool,
}

#[derive(Debug)]
struct Pool {
    max: u64,
    used: AtomicU64,
}

impl Pool {
    fn new(max: u64) -> Self {
        Self {
            max,
            used: AtomicU64::new(0),
        }
    }

    fn take(&self, bytes: u64) -> bool {
        let fits = |used: u64| used.checked_add(bytes).filter(|used| *used <= self.max);
        let order = Ordering::Relaxed;
        self.used.fetch_update(order, order, fits).is_ok()
    }

    fn give_back(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }
}

impl Budget {
    /// So many bytes in memory, then so many on disk.
    pub(super) fn new(memory: u64, disk: u64) -> Arc<Self> {
        Arc::new(Self {
            memory: Pool::new(memory),
            disk: Pool::new(disk),
        })
    }

    /// Bytes in memory and on disk that sessions hold now.
    pub(super) fn used(&self) -> (u64, u64) {
        let used = |pool: &Pool| pool.used.load(Ordering::Relaxed);
        (used(&self.memory), used(&self.disk))
    }
}

/// A frame that was kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Kept {
    pos0: u32,
    n_rows: u16,
    /// Bytes of the payload, and where it begins in the store.
    len: usize,
    at: u64,
}

impl Kept {
    fn end(&self) -> u32 {
        self.pos0 + u32::from(self.n_rows)
    }
}

/// The frames of one session, contiguous from position 0.
#[derive(Debug)]
pub(super) struct Retained {
    budget: Arc<Budget>,
    frames: VecDeque<Kept>,
    store: Store,
    /// Bytes of the store that frames fill.
    len: u64,
}

impl Sent for Retained {
    fn end(&self) -> u32 {
        Retained::end(self).unwrap_or(0)
    }

    fn rows_at(&self, pos: u32) -> Option<u16> {
        self.at(pos).map(|frame| frame.n_rows)
    }

    fn append(&mut self, pos: u32, out: &mut Vec<u8>) -> io::Result<()> {
        self.read(pos, out).map(drop)
    }
}

/// Where the payloads lie, one after the other.
#[derive(Debug)]
enum Store {
    Memory {
        bytes: Vec<u8>,
        taken: u64,
    },
    Disk {
        file: File,
        taken: u64,
    },
    /// The budgets are full, or the disk failed: nothing is kept any more.
    Lost,
}

impl Retained {
    pub(super) fn new(budget: Arc<Budget>) -> Self {
        Self {
            budget,
            frames: VecDeque::new(),
            store: Store::Memory {
                bytes: Vec::new(),
                taken: 0,
            },
            len: 0,
        }
    }

    /// One after the last position kept; `None` when nothing can be replayed any more.
    pub(super) fn end(&self) -> Option<u32> {
        match self.store {
            Store::Lost => None,
            Store::Memory { .. } | Store::Disk { .. } => {
                Some(self.frames.back().map_or(0, Kept::end))
            }
        }
    }

    /// Keeps a frame; what was kept from its position on is forgotten, as the KV is.
    pub(super) fn push(&mut self, rows: &Rows, payload: &[u8]) {
        self.keep(rows.pos0, rows.n_rows, payload);
    }

    /// The whole frames before `pos`, as another session's own.
    pub(super) fn copy(&mut self, pos: u32) -> Self {
        let mut copy = Self::new(self.budget.clone());
        let whole = self.frames.partition_point(|frame| frame.end() <= pos);
        let mut payload = Vec::new();
        for at in 0..whole {
            let Some(Kept { pos0, .. }) = self.frames.get(at).copied() else {
                break;
            };
            payload.clear();
            match self.read(pos0, &mut payload) {
                Ok(n_rows) => copy.keep(pos0, n_rows, &payload),
                Err(_) => break,
            }
        }
        copy
    }

    fn keep(&mut self, pos0: u32, n_rows: u16, payload: &[u8]) {
        self.truncate(pos0);
        if self.end() != Some(pos0) {
            return;
        }
        if let Err(why) = self.store(payload) {
            tracing::info!(%why, "frames are no longer retained; a failure below costs a new prefill");
            self.lose();
            return;
        }
        self.frames.push_back(Kept {
            pos0,
            n_rows,
            len: payload.len(),
            at: self.len,
        });
        self.len += payload.len() as u64;
    }

    /// Forgets the positions from `pos` on; a frame across it is cut.
    pub(super) fn truncate(&mut self, pos: u32) {
        while let Some(last) = self.frames.back_mut() {
            if last.end() <= pos {
                break;
            }
            if last.pos0 < pos {
                let left = (pos - last.pos0) as u16;
                last.len = last.len / usize::from(last.n_rows) * usize::from(left);
                last.n_rows = left;
                break;
            }
            self.frames.pop_back();
        }
        self.len = self
            .frames
            .back()
            .map_or(0, |last| last.at + last.len as u64);
        if let Store::Memory { bytes, .. } = &mut self.store {
            bytes.truncate(self.len as usize);
        }
    }

    /// Appends the payload of the frame that begins at `pos` to `out`; gives its rows.
    ///
    /// # Errors
    /// No frame begins there, or the disk fails.
    pub(super) fn read(&mut self, pos: u32, out: &mut Vec<u8>) -> io::Result<u16> {
        let Some(&Kept {
            n_rows, len, at, ..
        }) = self.at(pos)
        else {
            let why = format!("no retained frame begins at position {pos}");
            return Err(io::Error::new(io::ErrorKind::NotFound, why));
        };
        match &mut self.store {
            Store::Memory { bytes, .. } => {
                let begin = at as usize;
                out.extend_from_slice(bytes.get(begin..begin + len).unwrap_or_default());
            }
            Store::Disk { file, .. } => {
                let begin = out.len();
                out.resize(begin + len, 0);
                file.seek(SeekFrom::Start(at))?;
                file.read_exact(out.get_mut(begin..).unwrap_or_default())?;
            }
            Store::Lost => {}
        }
        Ok(n_rows)
    }

    /// Where the frame begins that `pos` is in.
    pub(super) fn frame_of(&self, pos: u32) -> u32 {
        let index = self.frames.partition_point(|frame| frame.end() <= pos);
        self.frames.get(index).map_or(pos, |frame| frame.pos0)
    }

    /// The frame that begins at `pos`.
    fn at(&self, pos: u32) -> Option<&Kept> {
        let index = self.frames.partition_point(|frame| frame.pos0 < pos);
        self.frames.get(index).filter(|frame| frame.pos0 == pos)
    }

    fn store(&mut self, payload: &[u8]) -> io::Result<()> {
        let end = self.len + payload.len() as u64;
        if let Store::Memory { bytes, taken } = &mut self.store {
            if grow(&self.budget.memory, taken, end) {
                // Exactly what the budget granted: no doubling behind its back.
                bytes.reserve_exact((*taken as usize).saturating_sub(bytes.len()));
                bytes.extend_from_slice(payload);
                return Ok(());
            }
            self.spill()?;
        }
        let Store::Disk { file, taken } = &mut self.store else {
            return Err(io::Error::other("the budgets for retained frames are full"));
        };
        if !grow(&self.budget.disk, taken, end) {
            return Err(io::Error::other("the budgets for retained frames are full"));
        }
        file.seek(SeekFrom::Start(self.len))?;
        file.write_all(payload)
    }

    /// Moves everything to a file of its own, which nobody else can open.
    fn spill(&mut self) -> io::Result<()> {
        let Store::Memory { bytes, taken } = &self.store else {
            return Ok(());
        };
        let mut on_disk = 0;
        if !grow(&self.budget.disk, &mut on_disk, self.len) {
            return Err(io::Error::other("the budgets for retained frames are full"));
        }
        let written =
            tempfile::tempfile().and_then(|mut file| file.write_all(bytes).map(|()| file));
        match written {
            Ok(file) => {
                self.budget.memory.give_back(*taken);
                self.store = Store::Disk {
                    file,
                    taken: on_disk,
                };
                Ok(())
            }
            Err(error) => {
                self.budget.disk.give_back(on_disk);
                Err(error)
            }
        }
    }

    fn lose(&mut self) {
        match &self.store {
            Store::Memory { taken, .. } => self.budget.memory.give_back(*taken),
            Store::Disk { taken, .. } => self.budget.disk.give_back(*taken),
            Store::Lost => {}
        }
        self.store = Store::Lost;
        self.frames.clear();
        self.len = 0;
    }
}

impl Drop for Retained {
    fn drop(&mut self) {
        self.lose();
    }
}

/// Takes pieces until `end` bytes are granted.
fn grow(pool: &Pool, taken: &mut u64, end: u64) -> bool {
    while *taken < end {
        // Larger pieces for larger stores: few copies on the way.
        let piece = (PIECE as u64).max(*taken / 2);
        if !pool.take(piece) {
            return false;
        }
        *taken += piece;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use swarm_proto::{Content, Dtype, Epoch, SessionId, Want};

    fn rows(pos0: u32, n_rows: u16) -> Rows {
        Rows {
            session: SessionId([0; 16]),
            epoch: Epoch(0),
            pos0,
            n_rows,
            content: Content::Hidden(Dtype::F32),
            want: Want::NONE,
            spent_us: 0,
        }
    }

    fn payload(pos0: u32, n_rows: u16, row: usize) -> Vec<u8> {
        let row_of = |pos| std::iter::repeat_n(pos as u8, row);
        (pos0..pos0 + u32::from(n_rows)).flat_map(row_of).collect()
    }

    fn fill(kept: &mut Retained, frames: u32, row: usize) {
        for i in 0..frames {
            kept.push(&rows(i * 4, 4), &payload(i * 4, 4, row));
        }
    }

    fn check(kept: &mut Retained, frames: u32, row: usize) {
        let mut out = Vec::new();
        for i in 0..frames {
            out.clear();
            assert_eq!(kept.read(i * 4, &mut out).unwrap(), 4);
            assert_eq!(out, payload(i * 4, 4, row), "frame {i}");
        }
        assert!(kept.read(frames * 4, &mut out).is_err());
    }

    #[test]
    fn frames_come_back_from_memory_and_from_disk() {
        for memory in [1 << 30, 3 * PIECE as u64, 0] {
            let budget = Budget::new(memory, 1 << 30);
            let mut kept = Retained::new(budget.clone());
            fill(&mut kept, 300, 1000);
            check(&mut kept, 300, 1000);
            let (in_memory, on_disk) = budget.used();
            assert_eq!(on_disk > 0, memory < 1 << 30);
            assert!(in_memory <= memory);
            drop(kept);
            assert_eq!(budget.used(), (0, 0));
        }
    }

    #[test]
    fn writing_at_a_position_forgets_what_was_there() {
        for memory in [1 << 30, 0] {
            let mut kept = Retained::new(Budget::new(memory, 1 << 30));
            fill(&mut kept, 3, 8);
            kept.push(&rows(6, 1), &[77; 8]);
            assert_eq!(kept.end(), Some(7));
            let mut out = Vec::new();
            let cut = kept.read(4, &mut out).unwrap();
            assert_eq!(cut, 2, "cut at the position");
            assert_eq!(out, payload(4, 2, 8));
            out.clear();
            kept.read(6, &mut out).unwrap();
            assert_eq!(out, [77; 8]);
            kept.push(&rows(0, 1), &[5; 8]);
            assert_eq!(kept.end(), Some(1));
        }
    }

    #[test]
    fn a_copy_ends_with_a_frame_and_is_counted() {
        for memory in [1 << 30, 0] {
            let budget = Budget::new(memory, 1 << 30);
            let mut kept = Retained::new(budget.clone());
            fill(&mut kept, 3, 8);
            let used = budget.used();
            let mut copy = kept.copy(11);
            assert_eq!(copy.end(), Some(8));
            assert_eq!(budget.used(), (2 * used.0, 2 * used.1));
            check(&mut copy, 2, 8);
            kept.push(&rows(0, 1), &[9; 8]);
            drop(kept);
            check(&mut copy, 2, 8);
            assert_eq!(copy.copy(0).end(), Some(0));
        }
        let mut full = Retained::new(Budget::new(PIECE as u64, 0));
        fill(&mut full, 3, 8);
        assert_eq!(full.copy(12).end(), None, "no budget is left for it");
    }

    #[test]
    fn full_budgets_end_retention_not_the_session() {
        let budget = Budget::new(PIECE as u64, 2 * PIECE as u64);
        let mut kept = Retained::new(budget.clone());
        fill(&mut kept, 1000, 1000);
        assert_eq!(kept.end(), None);
        assert_eq!(budget.used(), (0, 0));
        let mut other = Retained::new(budget);
        fill(&mut other, 2, 8);
        check(&mut other, 2, 8);
    }
}
