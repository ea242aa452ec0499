"""What stands between the page's visitors and Gradio."""
