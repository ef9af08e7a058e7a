//! Graphs as SVG: rows of ratios with their spread, and lines over a short list of places.
//!
//! Plain text with `currentColor` only, so that they read on light and dark pages alike.

use std::fmt::Write as _;

const WIDTH: f64 = 960.0;
const FONT: &str = r#"font-family="sans-serif" font-size="13" fill="currentColor""#;
const COLORS: [&str; 4] = ["#2a7fba", "#d1661c", "#5a9a3a", "#8a5aa8"];

/// One row of a graph of ratios.
pub struct Bar {
    /// What was measured.
    pub name: String,
    /// The ratio.
    pub at: f64,
    /// The lowest and the highest ratio of a round.
    pub spread: (f64, f64),
    /// What was aimed at, if anything.
    pub aim: Option<f64>,
}

/// One line of a graph.
pub struct Line {
    /// What it shows.
    pub name: String,
    /// A value for each place; a line may end early.
    pub values: Vec<f64>,
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn head(height: f64, title: &str) -> String {
    let title = escape(title);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" \
         color=\"#555\"><title>{title}</title>\n\
         <text x=\"10\" y=\"22\" {FONT} font-weight=\"bold\">{title}</text>\n"
    )
}

/// Ratios from top to bottom on a scale where twice as much and half as much look alike. Above 1
/// is to the right of the thick line; a short line across says what was aimed at.
pub fn ratios(title: &str, bars: &[Bar]) -> String {
    const LEFT: f64 = 480.0;
    const ROW: f64 = 24.0;
    let height = 60.0 + ROW * bars.len() as f64;
    let ends = |b: &Bar| [b.spread.0, b.spread.1, b.aim.unwrap_or(1.0)];
    let most = bars.iter().flat_map(ends).map(|v| v.log2().abs()).fold(1.0, f64::max).ceil();
    let x = |ratio: f64| LEFT + (WIDTH - LEFT - 20.0) * (ratio.log2() + most) / (2.0 * most);
    let mut svg = head(height, title);
    let steps = std::iter::successors(Some(-most), |step| Some(step + 1.0));
    for ratio in steps.take_while(|step| *step <= most).map(f64::exp2) {
        let (at, width) = (x(ratio), if ratio == 1.0 { 2.0 } else { 0.5 });
        let bottom = height - 10.0;
        let label = if ratio < 1.0 { format!("1/{}", ratio.recip()) } else { ratio.to_string() };
        let _ = writeln!(
            svg,
            "<line x1=\"{at:.1}\" y1=\"50\" x2=\"{at:.1}\" y2=\"{bottom}\" stroke=\"currentColor\" \
             stroke-width=\"{width}\"/>\
             <text x=\"{at:.1}\" y=\"44\" text-anchor=\"middle\" {FONT}>{label}</text>"
        );
    }
    for (i, bar) in (0..).zip(bars) {
        let y = 64.0 + ROW * f64::from(i);
        let (low, high, at) = (x(bar.spread.0), x(bar.spread.1), x(bar.at));
        let _ = writeln!(
            svg,
            "<text x=\"10\" y=\"{:.1}\" {FONT}>{}</text>\
             <line x1=\"{low:.1}\" y1=\"{y}\" x2=\"{high:.1}\" y2=\"{y}\" stroke=\"{}\" \
             stroke-width=\"3\"/><circle cx=\"{at:.1}\" cy=\"{y}\" r=\"5\" fill=\"{}\"/>",
            y + 4.0,
            escape(&bar.name),
            COLORS[0],
            COLORS[0],
        );
        if let Some(aim) = bar.aim.map(x) {
            let (top, bottom, color) = (y - 8.0, y + 8.0, COLORS[1]);
            let _ = writeln!(
                svg,
                "<line x1=\"{aim:.1}\" y1=\"{top}\" x2=\"{aim:.1}\" y2=\"{bottom}\" \
                 stroke=\"{color}\" stroke-width=\"3\"/>"
            );
        }
    }
    svg + "</svg>\n"
}

/// Lines over `places`, which stand at equal distances. The scale begins at zero.
pub fn lines(title: &str, places: &[String], lines: &[Line]) -> String {
    let (left, top, bottom, height) = (60.0, 40.0, 330.0, 380.0);
    let most = lines.iter().flat_map(|l| l.values.iter().copied()).fold(1e-9, f64::max) * 1.1;
    let step = (WIDTH - left - 200.0) / (places.len().max(2) - 1) as f64;
    let y = |value: f64| bottom - (bottom - top) * value / most;
    let mut svg = head(height, title);
    for part in 0..=4 {
        let value = most * f64::from(part) / 4.0;
        let (at, end) = (y(value), WIDTH - 190.0);
        let _ = writeln!(
            svg,
            "<line x1=\"{left}\" y1=\"{at:.1}\" x2=\"{end}\" y2=\"{at:.1}\" \
             stroke=\"currentColor\" stroke-width=\"0.5\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\" {FONT}>{value:.1}</text>",
            left - 8.0,
            at + 4.0,
        );
    }
    for (i, place) in (0..).zip(places) {
        let at = left + step * f64::from(i);
        let (low, place) = (bottom + 22.0, escape(place));
        let _ = writeln!(
            svg,
            "<text x=\"{at:.1}\" y=\"{low}\" text-anchor=\"middle\" {FONT}>{place}</text>"
        );
    }
    for (line, color) in lines.iter().zip(COLORS) {
        let mut points = String::new();
        let (mut end, mut last) = (left, bottom);
        for (i, value) in (0..).zip(&line.values) {
            (end, last) = (left + step * f64::from(i), y(*value));
            let _ = write!(points, "{end:.1},{last:.1} ");
        }
        let _ = writeln!(
            svg,
            "<polyline points=\"{points}\" fill=\"none\" stroke=\"{color}\" stroke-width=\"3\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" {FONT}>{}</text>",
            end + 8.0,
            last + 4.0,
            escape(&line.name),
        );
    }
    svg + "</svg>\n"
}
