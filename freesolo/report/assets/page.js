// Starts what the page has; an empty section says so in its own words and has no view.

const pageData = JSON.parse(document.getElementById("page-data").textContent);
const galleryView = document.getElementById("gallery-view");
const curvesView = document.getElementById("curves-view");

if (galleryView !== null) {
  galleryView.hidden = false;
  new Gallery(pageData.gallery, galleryView);
}
if (curvesView !== null) startCharts(pageData.curves, curvesView);
