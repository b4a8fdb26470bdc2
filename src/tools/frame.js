"use strict";
// For both pages. Text from the data is only ever set as text.
const at = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function scoreText(score) {
  if (score === null) return "";
  const size = Math.abs(score);
  const text = size !== 0 && (size < 0.01 || size >= 1e5) ? score.toExponential(1) : score.toFixed(size < 10 ? 2 : 1);
  return text.replace("-", "\u2212");
}

// A bar's length in percent, from the lowest to the highest of all scores.
function share(score, all) {
  const scores = all.filter((other) => other !== null);
  const low = Math.min(...scores), high = Math.max(...scores);
  return score === null ? 0 : high > low ? 4 + (96 * (score - low)) / (high - low) : 100;
}

function measure(kind, name, value, all) {
  const bar = make("span", { class: `track ${kind}` }, make("i", { style: `width: ${share(value, all)}%` }));
  const text = scoreText(kind ? Math.round(100 * value) / 100 : value);
  return make("div", { class: "measure", title: kind && `attribution ${value}` }, make("span", {}, name), bar, make("span", { class: "score" }, text));
}

