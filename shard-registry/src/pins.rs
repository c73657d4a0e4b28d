//! Pinned names: an alias that nothing moves to another model until its owner says so.

use swarm_proto::ModelId;

use crate::store::{AliasName, Store, StoreError};

/// The second line of a pinned alias.
const PINNED: &str = "pinned";

impl Store {
    /// The model that an alias is pinned to.
    pub fn pinned(&self, alias: &AliasName) -> Option<ModelId> {
        let text = self.alias_lines(alias)?;
        let mut lines = text.lines();
        let id = lines.next()?.trim().parse().ok()?;
        (lines.next()?.trim() == PINNED).then_some(id)
    }

    /// Points an alias at a model, in the store or not, and keeps it there. With `force` also one that is
    /// pinned to another.
    ///
    /// # Errors
    /// It is pinned to another; the store cannot be written.
    pub fn pin(&self, alias: &AliasName, id: ModelId, force: bool) -> Result<(), StoreError> {
        if !force {
            self.check_pin(alias, id)?;
        }
        self.write_alias(alias, &format!("{id}\n{PINNED}\n"))
    }

    /// Makes a pinned alias an ordinary one; returns what it was pinned to.
    ///
    /// # Errors
    /// The store cannot be written.
    pub fn unpin(&self, alias: &AliasName) -> Result<Option<ModelId>, StoreError> {
        let pinned = self.pinned(alias);
        if let Some(id) = pinned {
            self.write_alias(alias, &format!("{id}\n"))?;
        }
        Ok(pinned)
    }

    pub(crate) fn check_pin(&self, alias: &AliasName, id: ModelId) -> Result<(), StoreError> {
        match self.pinned(alias) {
            Some(pinned) if pinned != id => Err(StoreError::Pinned {
                alias: alias.clone(),
                pinned,
                other: id,
            }),
            _ => Ok(()),
        }
    }
}
