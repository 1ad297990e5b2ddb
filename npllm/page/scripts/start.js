// Each section has a place for its figure; a figure draws again when the colour scheme changes.
for (const [name, draw] of Object.entries(FIGURES)) {
  const host = document.querySelector(`#${name} .figure`);
  if (host !== null) draw(host, DATA[name]);
}
for (const node of document.querySelectorAll(".scroll")) FITS.observe(node);
document.documentElement.dataset.ready = "yes";
