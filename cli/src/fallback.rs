//! The whole model in this process, for a session that the swarm cannot hold any more
//! (`--local-fallback`). It is found and compared before anything starts, and loaded when it is needed.

use std::path::Path;

use engine::WholeModel;
use node::answer::{Cancel, Spare};
use swarm_proto::ModelId;

use crate::failure::Failure;
use crate::figures;
use crate::local_models::{self, WholeFile};
use crate::terminal;

/// A file of this machine that can stand in for the swarm.
pub struct Fallback {
    /// What the user calls it.
    pub name: String,
    /// The weights.
    pub file: WholeFile,
    /// The model that they are.
    id: ModelId,
    threads: Option<u32>,
    verify: bool,
}

impl Fallback {
    /// A model by name, beginning of its id, or file; a file is imported in place first. `verify`: whether
    /// all of it is hashed again before it is loaded.
    ///
    /// # Errors
    /// It is not here.
    pub fn find(
        home: &Path,
        name: &str,
        threads: Option<u32>,
        verify: bool,
    ) -> anyhow::Result<Self> {
        let id = local_models::find(home, name)?;
        let mut file = local_models::whole_file(home, name)?;
        file.id = Some(id);
        Ok(Self {
            name: figures::printable(name, 80),
            file,
            id,
            threads,
            verify,
        })
    }

    /// Refuses to stand in for another model.
    ///
    /// # Errors
    /// It is another.
    pub fn must_be(&self, id: ModelId, called: &str) -> Result<(), Failure> {
        if self.id == id {
            return Ok(());
        }
        Err(Failure::new(format!(
            "the fallback `{}` is model {}, not {called} ({})",
            self.name,
            self.id.short(),
            id.short()
        ))
        .try_this(
            "--local-fallback with the very file that the swarm serves; `shoal models` shows ids",
        ))
    }

    /// Whether it is what the user asked for, as far as this machine knows.
    pub fn is_meant(&self, home: &Path, asked: Option<&str>) -> bool {
        let known = |asked| local_models::find(home, asked).is_ok_and(|id| id == self.id);
        asked.is_none_or(known)
    }
}

/// Of a reason in words; a peer may have put some of them there.
pub const WHY_CHARS_MAX: usize = 300;

impl Spare for Fallback {
    fn load(&self, n_ctx: u32, why: &str, cancel: &Cancel) -> anyhow::Result<WholeModel> {
        terminal::warn(format!(
            "{}; the answer goes on in this process with `{}`",
            figures::printable(why, WHY_CHARS_MAX),
            self.name
        ));
        if self.verify {
            self.file.verify(cancel)?;
        }
        self.file.load(&self.name, n_ctx, self.threads)
    }
}
