//! Network cards of machines.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::devices::{LinkWhen, NetStatus};

/// The network card of a machine to boot.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RunNet {
    /// The tap interface that it is connected to, which is there already and nobody else's. Without
    /// it the card is connected to nothing, as that of a machine which is only to be forked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
}

/// What the network cards of children, or of a restored machine, are connected to. Without it they
/// are connected to nothing: no interface is handed on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ForkNet {
    /// The tap interface, which is there already and nobody else's. `{name}` in it stands for the
    /// name of the machine, `{n}` for its place among the children, from 0.
    pub tap: String,
    /// When the link comes up.
    #[serde(default)]
    pub link: LinkWhen,
}

/// The network card of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmNet {
    /// The tap interface that it is connected to, if it is connected.
    pub tap: Option<String>,
    /// When its link came or comes up, if the machine was forked or restored.
    pub link_when: LinkWhen,
    /// How it is; null for a machine that has ended, and where it was not asked: only what shows
    /// one machine asks.
    pub status: Option<NetStatus>,
}
