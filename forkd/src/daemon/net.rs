//! Network cards: which interface each machine gets, opened before anything is made.
//!
//! Invariant: an interface is open in one machine only. The kernel refuses a second one; and a
//! child never gets its parent's, because it gets none but what the request names.

use std::collections::BTreeSet;
use std::os::fd::{AsFd as _, BorrowedFd};

use format::{Error, Result};

use super::table::{Machine, object};
use crate::api::types::{ForkNet, RunNet};
use crate::devices::{LinkWhen, NetStatus};
use crate::process::wire::{Ask, NetHardware};
use crate::tap::{Tap, check_name};

/// The network card of a machine that is being made.
pub(super) struct Card {
    pub(super) is: NetHardware,
    tap: Option<Tap>,
}

impl Card {
    /// The card of a machine to boot.
    ///
    /// # Errors
    /// As [`Tap::open`].
    pub(super) fn to_boot(name: &str, asked: &RunNet) -> Result<Card> {
        let tap = asked.tap.as_deref().map(|tap| interface(tap, name, 0)).transpose()?;
        Card::open(tap, LinkWhen::default())
    }

    fn open(name: Option<String>, link: LinkWhen) -> Result<Card> {
        let tap = name.as_deref().map(Tap::open).transpose()?;
        Ok(Card { is: NetHardware { tap: name, link }, tap })
    }

    /// The open interface, to be passed to the machine's process.
    pub(super) fn file(&self) -> Option<BorrowedFd<'_>> {
        self.tap.as_ref().map(Tap::as_fd)
    }
}

/// The cards of machines called `names` that are made of one that has a card, or has none.
///
/// # Errors
/// `Invalid` when it has none and one is asked for, or two would get the same interface; as
/// [`Tap::open`].
pub(super) fn cards(
    has_card: bool,
    asked: Option<&ForkNet>,
    names: &[String],
) -> Result<Vec<Option<Card>>> {
    if asked.is_some() && !has_card {
        let reason = "it has no network card, and one cannot be added";
        return Err(Error::invalid(reason).hint("`vm run --net none` makes one with a card"));
    }
    if !has_card {
        return Ok(names.iter().map(|_| None).collect());
    }
    let Some(asked) = asked else {
        let unconnected = |_| Card::open(None, LinkWhen::default()).map(Some);
        return names.iter().map(unconnected).collect();
    };
    let taps = names.iter().enumerate().map(|(n, name)| interface(&asked.tap, name, n));
    let taps = taps.collect::<Result<Vec<_>>>()?;
    let mut seen = BTreeSet::new();
    if let Some(twice) = taps.iter().find(|tap| !seen.insert(*tap)) {
        return Err(Error::invalid("two machines cannot have the same interface")
            .on(format!("interface {twice}"))
            .hint("write {name} or {n} where the names of the interfaces differ"));
    }
    taps.into_iter().map(|tap| Card::open(Some(tap), asked.link).map(Some)).collect()
}

/// The interface for the machine called `name`, number `n` of its request.
fn interface(pattern: &str, name: &str, n: usize) -> Result<String> {
    let tap = pattern.replace("{name}", name).replace("{n}", &n.to_string());
    check_name(&tap).map_err(|e| e.within("connect", object(name)))?;
    Ok(tap)
}

/// How the network card of a machine is; `None` when it has none, has ended or does not say.
pub(super) fn status(machine: &Machine) -> Option<NetStatus> {
    machine.is.net.as_ref()?;
    machine.living_process().ok()?.ask_aside(&Ask::Net).ok()?
}

#[cfg(test)]
mod tests {
    use super::*;
    use format::Kind;

    fn refused(tap: &str, names: &[&str]) -> Error {
        let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
        let asked = ForkNet { tap: tap.into(), link: LinkWhen::AtOnce };
        cards(true, Some(&asked), &names).err().expect("a refusal")
    }

    #[test]
    fn every_child_has_an_interface_of_its_own() {
        assert_eq!(interface("t-{name}", "web1", 7).unwrap(), "t-web1");
        assert_eq!(interface("off{n}x{n}", "web1", 7).unwrap(), "off7x7");
        let same = refused("tap0", &["a", "b"]);
        assert_eq!(same.kind(), Kind::Invalid);
        assert!(same.to_string().contains("{name}"), "{same}");
        let long = refused("tap-{name}", &["a-long-name-of-a-vm"]);
        assert_eq!(long.kind(), Kind::Invalid);
        assert!(long.to_string().contains("vm a-long-name-of-a-vm"), "{long}");
        let missing = refused("offnone{n}", &["a", "b"]);
        assert_eq!(missing.kind(), Kind::NotFound);
        assert!(missing.to_string().contains("offnone0"), "{missing}");
    }

    #[test]
    fn no_interface_is_handed_on() {
        let names = ["a".to_owned(), "b".to_owned()];
        let cards = |has| cards(has, None, &names).unwrap();
        assert!(cards(true).iter().all(|card| card.as_ref().unwrap().is.tap.is_none()));
        assert!(cards(false).iter().all(Option::is_none));
        let asked = ForkNet { tap: "t".into(), link: LinkWhen::AtOnce };
        let error = super::cards(false, Some(&asked), &names).err().unwrap();
        assert!(error.to_string().contains("no network card"), "{error}");
    }
}
