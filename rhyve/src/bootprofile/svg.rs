//! A flame graph: stacks side by side, the wider the more samples, the callers below. Each box says
//! more when the pointer rests on it; it is a picture of plain SVG, without any script.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::stacks::Folded;

const WIDTH: f64 = 1200.0;
const ROW: f64 = 17.0;
const MARGIN: f64 = 10.0;
/// Room for the title.
const HEAD: f64 = 40.0;
/// Of a letter, at 12 pixels.
const LETTER: f64 = 7.0;
/// Narrower boxes are left out.
const THIN: f64 = 0.2;

#[derive(Default)]
struct Node {
    count: u64,
    callees: BTreeMap<String, Node>,
}

impl Node {
    fn depth(&self) -> usize {
        let depths = self.callees.values().map(|node| 1 + node.depth());
        depths.max().unwrap_or(0)
    }
}

/// Draws it.
pub(super) fn flame_graph(title: &str, stacks: &[Folded]) -> String {
    let mut root = Node::default();
    for stack in stacks {
        root.count += stack.count;
        let mut node = &mut root;
        for frame in &stack.frames {
            node = node.callees.entry(frame.clone()).or_default();
            node.count += stack.count;
        }
    }
    let height = HEAD + MARGIN + ROW * root.depth() as f64;
    let mut svg = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
         <svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{w}\" height=\"{height}\" \
         viewBox=\"0 0 {w} {height}\" font-family=\"monospace\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fffdf5\"/>\n\
         <text x=\"{MARGIN}\" y=\"24\" font-size=\"14\">{}</text>\n",
        escape(title),
        w = WIDTH + 2.0 * MARGIN,
    );
    let each = WIDTH / root.count.max(1) as f64;
    draw(&mut svg, &root, MARGIN, height - MARGIN, each, root.count);
    svg.push_str("</svg>\n");
    svg
}

/// Draws a node's callees above `floor`, from `left` on.
fn draw(svg: &mut String, node: &Node, mut left: f64, floor: f64, each: f64, total: u64) {
    for (name, callee) in &node.callees {
        let width = callee.count as f64 * each;
        if width >= THIN {
            let top = floor - ROW;
            let share = 100.0 * callee.count as f64 / total.max(1) as f64;
            let name = escape(name);
            // Writing to a String cannot fail.
            let _ = write!(
                svg,
                "<g><title>{name}: {} samples, {share:.1} %</title>\
                 <rect x=\"{left:.1}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{}\"/>",
                callee.count,
                (width - 0.5).max(THIN),
                ROW - 1.0,
                color(&name),
            );
            let letters = ((width - 6.0) / LETTER).max(0.0) as usize;
            if letters >= 3 {
                let text = shorten(&name, letters);
                let (x, y) = (left + 3.0, floor - 5.0);
                let _ = write!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\">{text}</text>");
            }
            svg.push_str("</g>\n");
            draw(svg, callee, left, top, each, total);
        }
        left += width;
    }
}

/// As much of a name as there is room for; an entity is not cut in two.
fn shorten(name: &str, letters: usize) -> String {
    if name.chars().count() <= letters {
        return name.to_owned();
    }
    let cut: String = name.chars().take(letters.saturating_sub(2)).collect();
    let whole = match cut.rfind('&') {
        Some(at) if !cut[at..].contains(';') => &cut[..at],
        _ => &cut,
    };
    format!("{whole}..")
}

/// A warm colour that is always the same for a name.
fn color(name: &str) -> String {
    let hash = name.bytes().fold(5381u32, |hash, byte| {
        hash.wrapping_mul(33) ^ u32::from(byte)
    });
    let [a, b, c, _] = hash.to_le_bytes();
    let (r, g, b) = (
        205 + u32::from(a) % 50,
        90 + u32::from(b) % 130,
        u32::from(c) % 60,
    );
    format!("#{r:02x}{g:02x}{b:02x}")
}

/// Text as XML has it. A guest chooses names, so what XML has no way to say becomes a question mark.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            c if c.is_control() => escaped.push('?'),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folded(frames: &[&str], count: u64) -> Folded {
        Folded {
            frames: frames.iter().map(|f| (*f).to_owned()).collect(),
            count,
        }
    }

    #[test]
    fn boxes_are_as_wide_as_their_samples() {
        let stacks = [
            folded(&["vcpu0", "main", "idle"], 3),
            folded(&["vcpu0", "main", "work<u8>"], 1),
        ];
        let svg = flame_graph("guest0", &stacks);
        assert!(svg.contains("main: 4 samples, 100.0 %"), "{svg}");
        assert!(svg.contains("width=\"899.5\""), "{svg}");
        assert!(svg.contains("work&lt;u8&gt;: 1 samples, 25.0 %"), "{svg}");
        assert_eq!(svg.matches("<g>").count(), svg.matches("</g>").count());
    }

    #[test]
    fn names_are_cut_to_their_boxes() {
        assert_eq!(shorten("short", 9), "short");
        assert_eq!(shorten("abc&lt;de", 7), "abc..");
        assert_eq!(escape("a\u{1b}b"), "a?b");
        assert!(flame_graph("none", &[]).ends_with("</svg>\n"));
    }
}
