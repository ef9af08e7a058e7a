//! Finds the links of Markdown files that lead nowhere.
//!
//! Only links into the tree are looked at: relative paths, and headings within a Markdown file.

use std::collections::{BTreeMap, BTreeSet};

use crate::rules::{File, directory};

/// A link whose target is not there; `line` counts from 0.
pub struct BrokenLink {
    pub path: String,
    pub line: usize,
    pub target: String,
}

/// Every link of every Markdown file that names a file or heading which does not exist.
pub fn broken_links(files: &[File]) -> Vec<BrokenLink> {
    let mut places = BTreeSet::from([String::new()]);
    let mut headings = BTreeMap::new();
    for file in files {
        let mut place = file.path.as_str();
        while !place.is_empty() {
            places.insert(place.to_owned());
            place = directory(place);
        }
        if file.path.ends_with(".md") {
            let text = String::from_utf8_lossy(&file.bytes);
            headings.insert(file.path.clone(), anchors(&text));
        }
    }
    let mut broken = Vec::new();
    for file in files.iter().filter(|f| f.path.ends_with(".md")) {
        for (line, target) in links(&String::from_utf8_lossy(&file.bytes)) {
            if !resolves(&file.path, &target, &places, &headings) {
                broken.push(BrokenLink { path: file.path.clone(), line, target });
            }
        }
    }
    broken
}

fn resolves(
    from: &str,
    target: &str,
    places: &BTreeSet<String>,
    headings: &BTreeMap<String, BTreeSet<String>>,
) -> bool {
    let scheme = target.split([':', '/']).next().unwrap_or_default();
    if target.starts_with(&format!("{scheme}:")) {
        return true;
    }
    let (path, anchor) = target.split_once('#').unwrap_or((target, ""));
    let place = if path.is_empty() { Some(from.to_owned()) } else { join(directory(from), path) };
    let Some(place) = place.filter(|p| places.contains(p)) else { return false };
    anchor.is_empty() || headings.get(&place).is_none_or(|known| known.contains(anchor))
}

/// `path` seen from `base`; `None` when it leaves the tree.
fn join(base: &str, path: &str) -> Option<String> {
    if path.starts_with('/') {
        return None;
    }
    let mut parts: Vec<&str> = base.split('/').filter(|p| !p.is_empty()).collect();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            name => parts.push(name),
        }
    }
    Some(parts.join("/"))
}

/// The lines outside fenced code, with their numbers.
fn prose(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut fenced = false;
    text.lines().enumerate().filter(move |(_, line)| {
        let fence = line.trim_start().starts_with("```") || line.trim_start().starts_with("~~~");
        fenced ^= fence;
        !fenced && !fence
    })
}

/// The link targets of `text`: inline links and images, and reference definitions.
fn links(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (number, line) in prose(text) {
        // Every second piece between backticks is code.
        let line: String = line.split('`').step_by(2).collect::<Vec<_>>().join("`");
        let inline = line.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        let reference = line
            .starts_with('[')
            .then(|| line.split_once("]: "))
            .flatten()
            .map(|(_, target)| target);
        for target in inline.chain(reference) {
            let target = target.split_whitespace().next().unwrap_or_default();
            found.push((number, target.trim_matches(['<', '>']).to_owned()));
        }
    }
    found
}

/// The names under which the headings of `text` can be linked to, as code hosts make them.
fn anchors(text: &str) -> BTreeSet<String> {
    let mut known = BTreeSet::new();
    for (_, line) in prose(text) {
        let title = line.trim_start_matches('#');
        if title.len() == line.len() || !title.starts_with(' ') {
            continue;
        }
        let name: String = title
            .trim()
            .to_lowercase()
            .chars()
            .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'))
            .map(|c| if c == ' ' { '-' } else { c })
            .collect();
        let repeated = (1..).map(|n| format!("{name}-{n}"));
        let free = std::iter::once(name.clone()).chain(repeated).find(|n| !known.contains(n));
        known.extend(free);
    }
    known
}
