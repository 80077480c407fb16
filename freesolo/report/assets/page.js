// Starts what the page has: a section with nothing to show is not there.

const pageData = JSON.parse(document.getElementById("page-data").textContent);
const galleryView = document.getElementById("gallery-view");
const curvesView = document.getElementById("curves-view");

if (galleryView !== null) {
  galleryView.hidden = false;
  new Gallery(pageData.gallery, galleryView);
}
if (curvesView !== null) startCharts(pageData.curves, curvesView);
