//! Persistence modes.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A mode to change to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetMode {
    /// `persistent`, `nonpersistent`, `undoable` or `append`.
    pub mode: String,
    /// Go on although completed writes of a live session are missing.
    #[serde(default)]
    pub accept_lost_tail: bool,
}
