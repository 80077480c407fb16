// Starts what the page has: a section with nothing to show is not there.

const pageData = JSON.parse(document.getElementById("page-data").textContent);
const groupsView = document.getElementById("groups-view");
const galleryView = document.getElementById("gallery-view");
const curvesView = document.getElementById("curves-view");
const trends = document.getElementById("trends");

if (groupsView !== null) {
  groupsView.hidden = false;
  new Groups(pageData.groups, groupsView);
}
if (galleryView !== null) {
  galleryView.hidden = false;
  new Gallery(pageData.gallery, galleryView);
}
if (curvesView !== null) startCharts(pageData.curves, curvesView);
if (trends !== null) startTrends(pageData.trends, trends);
