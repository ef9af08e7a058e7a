//! Metadata contexts: which a client may ask for, and what a query names.
//!
//! `base:allocation` is the protocol's own. `offshoot:changed-since:NAME` tells what changed since
//! this disk and the named ancestor had the same content; bit 0 of a status says "changed". A query
//! that ends in a colon lists what begins with it, and selects nothing.

use std::sync::Arc;

use format::{Kind, Result};

use super::{BlockStatus, Export, Visit};

/// Contexts of one connection, at most: each costs a walk per block status request.
pub const SELECTED_MAX: usize = 8;

const ALLOCATION: &str = "base:allocation";
const CHANGED_SINCE: &str = "offshoot:changed-since:";

/// A context that a client selected; its number is its place in the list.
#[derive(Clone)]
pub struct Context {
    pub name: String,
    pub status: Arc<dyn BlockStatus>,
}

struct Allocation(Arc<dyn Export>);

impl BlockStatus for Allocation {
    fn extents(&self, offset: u64, len: u64, visit: &mut Visit<'_>) -> Result<()> {
        self.0.allocation(offset, len, visit)
    }
}

/// Names of the contexts that `queries` ask for; no query asks for all.
pub fn list(export: &dyn Export, queries: &[&str]) -> Vec<String> {
    let changes = export.ancestors().into_iter().map(|name| format!("{CHANGED_SINCE}{name}"));
    let all = std::iter::once(ALLOCATION.to_owned()).chain(changes);
    let asked = |name: &String| {
        queries.is_empty()
            || queries.iter().any(|q| name == q || (q.ends_with(':') && name.starts_with(q)))
    };
    all.filter(asked).collect()
}

/// The context that `query` names exactly, if there is one.
///
/// # Errors
/// What prevents a context that is there from being used.
pub fn select(export: &Arc<dyn Export>, query: &str) -> Result<Option<Context>> {
    let status: Arc<dyn BlockStatus> = if query == ALLOCATION {
        Arc::new(Allocation(Arc::clone(export)))
    } else {
        let Some(ancestor) = query.strip_prefix(CHANGED_SINCE).filter(|a| !a.is_empty()) else {
            return Ok(None);
        };
        match export.changed_since(ancestor) {
            Err(e) if e.kind() == Kind::NotFound => return Ok(None),
            changes => changes?,
        }
    };
    Ok(Some(Context { name: query.to_owned(), status }))
}
