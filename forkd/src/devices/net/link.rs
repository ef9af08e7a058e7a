//! Whether a network card is connected, and what the guest reads about it: its address and the
//! state of its link.
//!
//! The link of a machine that boots is up as soon as there is an interface. That of a child or a
//! restored machine comes up in this order, and frames pass in neither direction before:
//! 1. the guest has taken its new identity, unless whoever made the machine did not want to wait
//!    for that: until then it has the random numbers of another machine;
//! 2. its driver has looked at the link and seen it down: it so forgets what it wanted to send as
//!    another machine, and looks again when it is told of the link that came up.
//!
//! Read and changed by vCPU threads and by the card's own; the lock is held for a few
//! instructions.

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Bytes of configuration space: address, status, number of pairs of queues.
const SPACE: usize = 10;
/// Offset of the status.
const STATUS: usize = 6;
/// Status: the link is up.
const LINK_UP: u8 = 1;

/// When the link of a child or of a restored machine comes up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum LinkWhen {
    /// When its guest says that it has taken its new identity.
    #[default]
    Identified,
    /// Without waiting for that: for a guest that has no agent which says so.
    AtOnce,
}

/// How the link of a network card is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum LinkState {
    /// Frames pass.
    Up,
    /// It is connected to nothing.
    NoTap,
    /// The interface that it was connected to is gone.
    TapGone,
    /// The guest has not said yet that it has taken its new identity.
    WaitsForIdentity,
    /// The guest's driver has not looked at the link yet since the machine was made.
    WaitsForDriver,
}

impl LinkState {
    /// The name that people and programs see.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            LinkState::Up => "up",
            LinkState::NoTap => "no-tap",
            LinkState::TapGone => "tap-gone",
            LinkState::WaitsForIdentity => "waits-for-identity",
            LinkState::WaitsForDriver => "waits-for-driver",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cable {
    None,
    There,
    Gone,
}

#[derive(Debug)]
struct State {
    mac: [u8; 6],
    cable: Cable,
    when: LinkWhen,
    /// Whether the guest has taken its identity.
    identified: bool,
    /// Whether the driver has still to see the link down.
    unseen: bool,
    /// What the driver is told.
    up: bool,
    generation: u32,
}

#[derive(Debug)]
pub(super) struct Link(Mutex<State>);

impl Link {
    pub(super) fn new(connected: bool, when: LinkWhen) -> Link {
        Link(Mutex::new(State {
            mac: [0; 6],
            cable: if connected { Cable::There } else { Cable::None },
            when,
            identified: true,
            unseen: false,
            up: false,
            generation: 0,
        }))
    }

    /// Gives the card its address.
    pub(super) fn set_mac(&self, mac: [u8; 6]) {
        let mut state = self.0.lock();
        state.mac = mac;
        state.generation = state.generation.wrapping_add(1);
    }

    /// The machine is another one from here on than the one that was saved.
    pub(super) fn begin_anew(&self) {
        let mut state = self.0.lock();
        state.identified = false;
        state.up = false;
    }

    /// The guest has taken its identity.
    pub(super) fn identified(&self) {
        self.0.lock().identified = true;
    }

    /// The driver knows of the link what another machine knew, or knows nothing.
    pub(super) fn set_unseen(&self, unseen: bool) {
        self.0.lock().unseen = unseen;
    }

    /// Whether the driver has still to see the link down.
    pub(super) fn is_unseen(&self) -> bool {
        self.0.lock().unseen
    }

    /// The interface is gone.
    pub(super) fn cable_is_gone(&self) {
        let mut state = self.0.lock();
        state.cable = Cable::Gone;
        state.set_up(false);
    }

    /// Lets the link come up, if nothing stands in the way any more.
    pub(super) fn raise(&self) {
        let mut state = self.0.lock();
        if state.may_be() == LinkState::Up {
            state.set_up(true);
        }
    }

    pub(super) fn is_up(&self) -> bool {
        self.0.lock().up
    }

    /// Whether it is down and could come up.
    pub(super) fn is_to_come_up(&self) -> bool {
        let state = self.0.lock();
        !state.up && state.may_be() == LinkState::Up
    }

    pub(super) fn state(&self) -> LinkState {
        let state = self.0.lock();
        match state.may_be() {
            // In a moment, when the card's thread has looked.
            LinkState::Up if !state.up => LinkState::WaitsForDriver,
            other => other,
        }
    }

    pub(super) fn generation(&self) -> u32 {
        self.0.lock().generation
    }

    /// Reads configuration space; whether the driver so saw for the first time that the link is
    /// down.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) -> bool {
        let mut state = self.0.lock();
        let mut space = [0; SPACE];
        space[..STATUS].copy_from_slice(&state.mac);
        space[STATUS] = if state.up { LINK_UP } else { 0 };
        space[8] = 1;
        let Ok(at) = usize::try_from(offset) else { return false };
        for (to, from) in data.iter_mut().zip(space.get(at..).unwrap_or_default()) {
            *to = *from;
        }
        let looked = at <= STATUS && STATUS - at < data.len();
        looked && std::mem::take(&mut state.unseen)
    }
}

impl State {
    fn set_up(&mut self, up: bool) {
        if self.up != up {
            self.up = up;
            self.generation = self.generation.wrapping_add(1);
        }
    }

    /// How the link can be, as things are.
    fn may_be(&self) -> LinkState {
        match self.cable {
            Cable::None => LinkState::NoTap,
            Cable::Gone => LinkState::TapGone,
            Cable::There if !self.identified && self.when == LinkWhen::Identified => {
                LinkState::WaitsForIdentity
            }
            Cable::There if self.unseen => LinkState::WaitsForDriver,
            Cable::There => LinkState::Up,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(link: &Link) -> (u8, bool) {
        let mut status = [9; 2];
        let saw = link.read(6, &mut status);
        assert_eq!(status[1], 0);
        (status[0], saw)
    }

    /// A child, whose driver was that of its parent.
    fn child(when: LinkWhen) -> Link {
        let link = Link::new(true, when);
        link.begin_anew();
        link.set_unseen(true);
        link
    }

    #[test]
    fn a_child_is_connected_when_it_knows_who_it_is_and_its_driver_saw_the_link_down() {
        let link = child(LinkWhen::Identified);
        link.raise();
        assert_eq!((link.state(), link.is_up()), (LinkState::WaitsForIdentity, false));
        link.identified();
        link.raise();
        assert_eq!((link.state(), link.is_up()), (LinkState::WaitsForDriver, false));
        // The address alone tells nothing about the link.
        assert!(!link.read(0, &mut [0; 6]));
        assert_eq!(status(&link), (0, true));
        assert_eq!(status(&link), (0, false), "once");
        link.raise();
        assert_eq!((link.state(), status(&link)), (LinkState::Up, (1, false)));

        let other_order = child(LinkWhen::Identified);
        assert_eq!(status(&other_order), (0, true));
        other_order.raise();
        assert!(!other_order.is_up());
        other_order.identified();
        assert!(other_order.is_to_come_up());
    }

    #[test]
    fn a_child_need_not_be_waited_for() {
        let link = child(LinkWhen::AtOnce);
        assert_eq!(link.state(), LinkState::WaitsForDriver);
        assert_eq!(status(&link), (0, true));
        link.raise();
        assert!(link.is_up());
    }

    #[test]
    fn nothing_comes_up_without_an_interface() {
        let link = Link::new(false, LinkWhen::AtOnce);
        link.raise();
        assert_eq!((link.state(), link.is_up()), (LinkState::NoTap, false));
        let link = Link::new(true, LinkWhen::AtOnce);
        link.raise();
        let before = link.generation();
        link.cable_is_gone();
        link.raise();
        assert_eq!((link.state(), status(&link)), (LinkState::TapGone, (0, false)));
        assert_ne!(link.generation(), before);
    }

    #[test]
    fn reads_past_the_end_give_what_was_there() {
        let link = Link::new(true, LinkWhen::AtOnce);
        link.set_mac([1, 2, 3, 4, 5, 6]);
        let mut data = [7; 6];
        link.read(5, &mut data[..2]);
        link.read(10, &mut data[2..]);
        link.read(u64::MAX, &mut data[2..]);
        assert_eq!(data, [6, 0, 7, 7, 7, 7]);
    }
}
