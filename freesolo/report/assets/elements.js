// Built from text and attributes alone, never from markup: names in the data may look like tags.

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function element(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function shape(tag, attributes = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

// The colour of a chart's line; the style sheet has six of them.
function seriesColour(index) {
  return `var(--series-${index % 6})`;
}

// The colour of a label set where several share a photo.
function layerColour(index) {
  return `var(--layer-${index % 6})`;
}

function countOf(some, all) {
  if (all === 0) return "no masks";
  const noun = all === 1 ? "mask" : "masks";
  return some === all ? `${all} ${noun}` : `${some} of ${all} ${noun}`;
}
